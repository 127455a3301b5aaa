"""What strangers and wrong hands do: made-up meta data of checkpoints, two runs in one workdir, Ctrl-C at any moment."""

import concurrent.futures
import contextlib
import copy
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from nfnets.errors import UserError
from nfnets.train.checkpoints.reader import CheckpointReader
from nfnets.train.evaluate import saved_config
from tests.faults import runs
from tests.faults.checkpoint_faults import save
from tests.train.checkpoints.test_hostile import reseal

JUNK = (
  *(
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    2**40,
    2**63,
    10**400,
    "",
    "x",
    "²",
    "\x1b[2J",
    "a/../../b",
    "9" * 5000,
  ),
  *([], [[]], [None], {}, {"": ""}, ["float32", [2**31, 2**31]], {"name": "nfnet_f7"}, [1] * 1000),
)


def places(value, path=()) -> list[tuple]:
  """The paths of everything in nested mappings and lists."""
  items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  return [path, *(place for name, inner in items for place in places(inner, (*path, name)))]


def mutated(body: dict, draw: random.Random) -> dict:
  """A copy of the body in which one to three values are junk or gone."""
  body = copy.deepcopy(body)
  for _ in range(draw.randint(1, 3)):
    *parents, name = draw.choice(places(body)[1:])
    parent = body
    for step in parents:
      parent = parent[step]
    if draw.random() < 0.2:
      del parent[name]
    else:
      parent[name] = copy.deepcopy(draw.choice(JUNK))
  return body


def test_mutated_meta_data_and_manifests_are_read_or_refused_in_words(tmp_path, full, row):
  """Sealed with right digests, as somebody would who makes them up."""
  save(tmp_path, 1)
  step, draw, count = tmp_path / "checkpoints" / "1", random.Random(1), 2000 if full else 60
  original = (step / "meta" / "metadata").read_text()
  meta, whole = json.loads(original), (step / "manifest.json").read_bytes()
  manifest = {name: value for name, value in json.loads(whole).items() if name != "sha256"}
  outcomes = {"read": 0, "refused": 0}
  for number in range(count):
    if number % 2:
      (step / "meta" / "metadata").write_text(json.dumps(mutated(meta, draw)))
      reseal(step)
    else:
      changed = mutated(manifest, draw)
      reseal(step, **{name: changed.get(name, ...) for name in manifest})
    try:
      reader = CheckpointReader(str(tmp_path), say=lambda line: None)
      chosen = reader.choose()
      reader.restore_weights(chosen)
      outcomes["read"] += 1
      with contextlib.suppress(UserError):  # the arrays of this checkpoint are of no real network
        saved_config(reader.meta(chosen), "here")
    except UserError as error:
      assert str(error).count("\n") == 0
      outcomes["refused"] += 1
    (step / "meta" / "metadata").write_text(original)
    (step / "manifest.json").write_bytes(whole)
  assert min(outcomes.values()) > 0
  row(
    f"{count:,} mutated meta data and manifests with right digests (seed 1)",
    f"{outcomes['read']} read, {outcomes['refused']} refused in a line, anything else 0",
  )


@pytest.mark.long
def test_two_runs_in_one_workdir(clean, tmp_path, row):
  slow = {"slow": {"seconds": 0.3}}
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    ended = sorted(pool.map(lambda _: runs.run(tmp_path, slow), range(2)), key=lambda run: run.status)
  assert [run.status for run in ended] == [0, 2], [run.output for run in ended]
  assert "another run has it (process" in ended[1].output.splitlines()[-1] and "Traceback" not in ended[1].output
  assert runs.difference(tmp_path, clean) == 0
  row("two runs started in one workdir", "one ended equal to the bit, the other with a line and status 2")


@pytest.mark.long
def test_ctrl_c_twice_while_it_compiles(tmp_path, row):
  command = [sys.executable, "-m", "launch.train", "--config=configs/synthetic.py:nf_resnet50", f"--workdir={tmp_path}"]
  seconds = []
  for pause in (6, 9, 12, 15):
    running = subprocess.Popen(
      [*command, "--config.data.image_size=64", "--config.batch=8"],
      cwd=runs.ROOT,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    time.sleep(pause)
    begin = time.monotonic()
    for _ in range(2):
      running.send_signal(signal.SIGINT)
      time.sleep(0.3)
    _, said = running.communicate(timeout=60)
    seconds.append(time.monotonic() - begin)
    assert running.returncode == 130, said
    shutil.rmtree(tmp_path)
    pathlib.Path(tmp_path).mkdir()
  assert max(seconds) < 10
  row("Ctrl-C twice while it starts and compiles, at 4 moments", f"status 130 after at most {max(seconds):.1f} s")
