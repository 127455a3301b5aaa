"""Tests that take minutes, for python -m tests.faults only: other numbers of devices, every signal, ten minutes of faults."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tests.faults import runs

pytestmark = pytest.mark.long


@pytest.mark.parametrize("processes, devices", [(1, 4), (2, 2), (4, 1)])
def test_every_way_to_share_the_work_is_the_same_run(clean, tmp_path, processes, devices, row):
  """Compares parameters, averages and losses with a sharded state and four parts a batch instead of two."""
  ended = runs.run(
    tmp_path, processes=processes, devices=devices, overrides=("--config.shard=True", "--config.accumulate=4"), timeout=600
  )
  assert ended.status == 0, ended.output
  difference = runs.difference(tmp_path, clean)
  losses = [[record["loss"] for record in runs.records(workdir, "train")] for workdir in (tmp_path, clean)]
  np.testing.assert_allclose(*losses, rtol=1e-5)
  assert difference < 1e-5
  row(
    f"{processes} processes of {devices} devices, sharded, 4 parts instead of 2",
    f"largest difference of a parameter {difference:.1e}",
  )


def test_other_numbers_of_devices_go_on_with_the_same_run(clean, tmp_path, row):
  before = None
  for step, devices in ((5, 1), (12, 2), (None, 4)):
    (tmp_path / "done-SIGTERM-0").unlink(missing_ok=True)
    ended = runs.run(tmp_path, {"SIGTERM": {"step": step}} if step else {}, devices=devices)
    assert ended.status == (75 if step else 0), ended.output
    assert before is None or runs.steps_lost(before, ended) == 0
    before = ended
  losses = [[record["loss"] for record in runs.records(workdir, "test")] for workdir in (tmp_path, clean)]
  np.testing.assert_allclose(*losses, rtol=1e-4)
  mismatches = runs.mismatches(tmp_path, clean)
  assert mismatches == 0
  row(
    "resumed on 1, 2, then 4 devices",
    f"batch mismatches 0, largest difference of a test loss {np.max(np.abs(np.subtract(*losses))):.1e}",
  )


def test_sigterm_to_all_processes(clean_pair, tmp_path, row):
  faults = {"SIGTERM": {"process": 1, "step": 9}, "SIGINT": {"process": 0, "step": 9}}
  ended = runs.run(tmp_path, faults, processes=2)
  assert ended.status == 75, ended.output
  step = int(runs.weights(tmp_path)["step"])
  again = runs.run(tmp_path, processes=2)
  assert again.status == 0 and runs.difference(tmp_path, clean_pair) == 0, again.output
  lost = runs.steps_lost(ended, again)
  assert lost == 0
  row(
    "SIGTERM and SIGINT, one to each of 2 processes",
    f"both saved step {step}, ended with 75, resume equal to the bit",
    steps_lost=lost,
  )


def test_a_learning_rate_ten_times_too_high(clean, tmp_path, row):
  """The rate ruins every attempt after the checkpoint of step 9, so the run ends after ten; with the right rate it goes on."""
  policy = ("--config.on_bad_step=rollback", "--config.spike=2")
  ended = runs.run(tmp_path, {"lr": {"first": 9, "last": 12, "factor": 10.0}}, overrides=policy)
  last = ended.output.splitlines()[-1]
  assert ended.status == 1 and "is above config.spike=2 × its running mean" in last and "rolled back 10 times before" in last
  again = runs.run(tmp_path, overrides=policy)
  assert again.status == 0, again.output
  end, usual = (runs.records(workdir, "test")[-1]["loss"] for workdir in (tmp_path, clean))
  assert end == usual
  row(
    "10 × the learning rate, policy rollback",
    f"10 times back, then ended in words; with the right one final loss {end:.4f}, without the fault {usual:.4f}",
  )


def test_a_run_on_a_full_disk(clean, tmp_path, row):
  """The disk is full from step 5 to 16, while checkpoints and records are written; the run ends as if it had not been."""
  mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(tmp_path)], capture_output=True, text=True)
  if mount.returncode:
    pytest.skip(f"no tmpfs can be mounted: {mount.stderr}")
  try:
    ended = runs.run(tmp_path, {"full": {"first": 5, "last": 16}})
    assert ended.status == 0, ended.output
    failed = ended.output.count("could not be written to")
    assert failed >= 2
    assert runs.difference(tmp_path, clean) == 0
    assert runs.records(tmp_path, "test") == runs.records(clean, "test")
  finally:
    subprocess.run(["umount", str(tmp_path)], check=True)
  row("disk full for half of a run (tmpfs)", f"{failed} saves failed and said so, later ones worked; end equal to the bit")


def test_a_process_that_does_not_come(tmp_path, row):
  command = [
    sys.executable,
    "-m",
    "launch.train",
    "--config=tests/faults/recipe.py",
    f"--workdir={tmp_path}",
    "--coordinator=127.0.0.1:29641",
    "--processes=2",
    "--process=0",
    "--start_timeout=4",
  ]
  begin = time.monotonic()
  done = subprocess.run(
    command, cwd=runs.ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=60
  )
  assert done.returncode == 76 and "1" in done.stderr.splitlines()[-1], done.stderr
  row("1 of 2 processes never starts", f"status 76 after {time.monotonic() - begin:.0f} s: {done.stderr.splitlines()[-1][:90]}")


def test_goodput_of_a_long_run_with_faults(tmp_path, row):
  """A random process is killed or gets SIGTERM every 100 to 180 steps, and launch.pods.local starts the run again.

  Faults go by steps, not by seconds, so that a faster machine does not see fewer of them.
  """
  rng, ended, faults = random.Random(0), threading.Event(), []
  batches = tmp_path / "batches-0.jsonl"
  made = lambda: batches.read_bytes().count(b"\n") if batches.exists() else 0

  def strike():
    due = rng.uniform(100, 180)
    while not ended.wait(0.1):
      if made() < due:
        continue
      process, number = rng.randrange(2), rng.choice((signal.SIGKILL, signal.SIGTERM))
      try:
        os.kill(int((tmp_path / f"pid-{process}").read_text()), number)
      except (OSError, ValueError):
        continue
      faults.append(number.name)
      due = made() + rng.uniform(100, 180)

  striker = threading.Thread(target=strike)
  striker.start()
  steps = int(os.environ.get("NFNETS_CHAOS_STEPS", 2000))
  try:
    done = runs.run(
      tmp_path,
      {"pid": {}},
      epochs=steps / 11.2265625,
      processes=2,
      restarts=100,
      grace=20,
      timeout=3600,
      overrides=("--config.checkpoint_every=4", "--config.eval_every=1000", "--config.log_every=10"),
    )
  finally:
    ended.set()
    striker.join()
  assert done.status == 0, done.output[-3000:]
  assert len(faults) > steps // 250 and {*faults} == {"SIGKILL", "SIGTERM"}
  lines = made()
  reached = int(runs.weights(tmp_path)["step"])
  assert all(len(hashes) == 1 for hashes in runs.batches(tmp_path).values())
  row(
    f"{done.seconds / 60:.0f} minutes of training with {len(faults)} faults ({faults.count('SIGKILL')} kills, "
    f"{faults.count('SIGTERM')} SIGTERM)",
    f"{reached} steps reached, {lines} batches made; none differed when made again",
    goodput=reached / lines,
    lost_per_fault=(lines - reached) / len(faults),
  )
