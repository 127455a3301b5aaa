"""Training runs to make faults in, as their users start them, and what is left of them."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np

from nfnets.train.checkpoints.reader import CheckpointReader

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Ended:
  status: int
  seconds: float
  output: str


def run(
  workdir: pathlib.Path,
  faults: dict | None = None,
  *,
  epochs: float = 2,
  processes: int = 1,
  devices: int = 1,
  restarts: int = 0,
  overrides: tuple[str, ...] = (),
  grace: float = 60,
  timeout: float = 300,
) -> Ended:
  """launch.train, with faults, on `processes` of `devices` CPU devices each; its last line of stderr is in the output too."""
  command = [
    sys.executable,
    "-m",
    "tests.faults.driver",
    f"--config=tests/faults/recipe.py:{epochs:g}",
    f"--workdir={workdir}",
    *overrides,
  ]
  if processes > 1 or restarts:
    command = [
      sys.executable,
      "-m",
      "launch.pods.local",
      f"--processes={processes}",
      f"--devices={devices}",
      f"--restarts={restarts}",
      f"--grace={grace}",
      "--",
      *command,
    ]
  flags = (
    f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0"
  )
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NFNETS_FAULTS": json.dumps(faults or {})}
  begin = time.monotonic()
  done = subprocess.run(
    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
  )
  return Ended(done.returncode, time.monotonic() - begin, done.stdout)


def resumed(ended: Ended) -> int | None:
  """The step that the run went on from."""
  found = re.search(r"resumed from \S+/checkpoints/(\d+)", ended.output)
  return found and int(found[1])


def steps_lost(stopped: Ended, again: Ended) -> int:
  """Between the step at which a run says that it was stopped and the one that the next run went on from."""
  return int(re.search(r"stopped by .* at step (\d+) of", stopped.output)[1]) - resumed(again)


def weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """Parameters and their average of the newest checkpoint."""
  checkpoints = CheckpointReader(str(workdir))
  step = checkpoints.choose()
  found = {
    f"{which}/{path}": array for which in ("params", "ema") for path, array in checkpoints.restore_weights(step, which).items()
  }
  return found | {"step": np.int64(step)}


def difference(a: pathlib.Path, b: pathlib.Path) -> float:
  """The largest difference between two runs' last weights, which must be of one step."""
  one, other = weights(a), weights(b)
  assert one.keys() == other.keys() and one["step"] == other["step"]
  return float(np.max([np.max(np.abs(one[path] - other[path])) for path in one]))  # not Python's max, which may miss a NaN


def batches(workdir: pathlib.Path, process: int = 0) -> dict[int, set[str]]:
  """The hashes of the batches that were made for each step; more than one where they were not the same."""
  found: dict[int, set[str]] = {}
  for line in (workdir / f"batches-{process}.jsonl").read_text().splitlines():
    entry = json.loads(line)
    found.setdefault(entry["step"], set()).add(entry["batch"])
  return found


def records(workdir: pathlib.Path, kind: str) -> list[dict]:
  return [
    record
    for line in (workdir / "metrics.jsonl").read_text().splitlines()
    for record in [json.loads(line)]
    if record["kind"] == kind
  ]


def mismatches(workdir: pathlib.Path, reference: pathlib.Path, process: int = 0) -> int:
  """How many steps got a batch that is not the reference's; every step must have got one."""
  mine, expected = batches(workdir, process), batches(reference, process)
  assert mine.keys() == expected.keys()
  return sum(mine[step] != expected[step] for step in expected)
