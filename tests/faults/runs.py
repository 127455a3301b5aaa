"""Starts training runs as users do, to make faults in them, and reads what they leave behind."""

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
from tests.xla import FAST

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
  """Runs launch.train, with faults, in `processes` processes of `devices` CPU devices each; the output includes stderr."""
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
  flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false {FAST}"
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NFNETS_FAULTS": json.dumps(faults or {})}
  begin = time.monotonic()
  done = subprocess.run(
    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
  )
  return Ended(done.returncode, time.monotonic() - begin, done.stdout)


def resumed(ended: Ended) -> int | None:
  """Returns the step that the run went on from, None where it began anew."""
  match = re.search(r"resumed from \S+/checkpoints/(\d+)", ended.output)
  return match and int(match[1])


def steps_lost(stopped: Ended, again: Ended) -> int:
  """Returns how many steps lie between the one at which a run says it was stopped and the one that the next run went on from."""
  return int(re.search(r"stopped by .* at step (\d+) of", stopped.output)[1]) - resumed(again)


def weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the parameters and their averages in the newest checkpoint, and its step."""
  checkpoints = CheckpointReader(str(workdir))
  step = checkpoints.choose()
  arrays = {
    f"{which}/{path}": array for which in ("params", "ema") for path, array in checkpoints.restore_weights(step, which).items()
  }
  return arrays | {"step": np.int64(step)}


def difference(a: pathlib.Path, b: pathlib.Path) -> float:
  """Returns the largest difference between the last weights of two runs, which must be of the same step."""
  first, second = weights(a), weights(b)
  assert first.keys() == second.keys() and first["step"] == second["step"]
  return float(np.max([np.max(np.abs(first[path] - second[path])) for path in first]))  # Python's max could miss a NaN


def batches(workdir: pathlib.Path, process: int = 0) -> dict[int, set[str]]:
  """Returns the hashes of the batches that were made for each step, several where they were not the same."""
  hashes: dict[int, set[str]] = {}
  for line in (workdir / f"batches-{process}.jsonl").read_text().splitlines():
    entry = json.loads(line)
    hashes.setdefault(entry["step"], set()).add(entry["batch"])
  return hashes


def records(workdir: pathlib.Path, kind: str) -> list[dict]:
  return [
    record
    for line in (workdir / "metrics.jsonl").read_text().splitlines()
    for record in [json.loads(line)]
    if record["kind"] == kind
  ]


def mismatches(workdir: pathlib.Path, reference: pathlib.Path, process: int = 0) -> int:
  """Returns how many steps got other batches than in the reference, and asserts that both runs made the same steps."""
  mine, expected = batches(workdir, process), batches(reference, process)
  assert mine.keys() == expected.keys()
  return sum(mine[step] != expected[step] for step in expected)
