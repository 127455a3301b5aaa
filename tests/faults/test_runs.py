"""Makes faults in whole runs: what is lost, how long it takes, and whether they end as a run without faults does."""

import itertools
import random
import shutil
import time

import numpy as np
import pytest

from nfnets import distributed
from nfnets.train.checkpoints import manifest
from nfnets.train.checkpoints.reader import CheckpointReader
from tests.faults import runs

EVERY = 4  # steps between two checkpoints of the recipe


@pytest.mark.long
def test_stopped_five_times_and_resumed_equals_never_having_stopped(clean, tmp_path, row):
  """The steps are drawn anew each time, and the signal comes while one is computed; the first epoch ends at step 12."""
  stops, runs_of_it = sorted([10, *random.sample([0, 2, 4, 6, 8, 12, 14, 16, 18], 4)]), []
  for at in stops:
    runs_of_it.append(runs.run(tmp_path, {"SIGTERM": {"step": at}}))
    assert runs_of_it[-1].status == 75 and "the same command goes on from there" in runs_of_it[-1].output, runs_of_it[-1].output
    assert runs.weights(tmp_path)["step"] == at + 2  # one more step was under way
    (tmp_path / "done-SIGTERM-0").unlink()
  runs_of_it.append(runs.run(tmp_path))
  assert runs_of_it[-1].status == 0, runs_of_it[-1].output
  lost = sum(runs.steps_lost(before, after) for before, after in itertools.pairwise(runs_of_it))
  assert lost == 0 and runs.difference(tmp_path, clean) == 0 and runs.mismatches(tmp_path, clean) == 0, stops
  assert runs.records(tmp_path, "test") == runs.records(clean, "test")
  row(
    f"SIGTERM at 5 random steps ({', '.join(str(at + 2) for at in stops)}), resume each time",
    "parameter difference 0, batch mismatches 0, evaluations equal",
    steps_lost=lost,
  )


@pytest.mark.long
def test_several_processes_are_one_run(clean, clean_pair, row):
  """Two processes train what one does: the same batches, parameters to 1e-5; only process 0 logs."""
  assert runs.difference(clean_pair, clean) < 1e-5
  losses = [[record["loss"] for record in runs.records(workdir, "train")] for workdir in (clean_pair, clean)]
  np.testing.assert_allclose(*losses, rtol=1e-5)
  row("2 processes instead of 1", f"largest difference of a parameter {runs.difference(clean_pair, clean):.1e}")


@pytest.mark.long
@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_process_ends_all_and_a_restart_goes_on(clean_pair, tmp_path, rank, row):
  faults = {
    "SIGKILL": {"process": rank, "step": 14},
    "slow": {"seconds": 0.2},
  }  # slow enough for a checkpoint to be written within a step
  ended = runs.run(tmp_path, faults, processes=2)
  seconds = time.time() - (tmp_path / f"done-SIGKILL-{rank}").stat().st_mtime
  assert ended.status in (76, 137) and seconds < 60, ended.output
  reached = max(runs.batches(tmp_path, 1 - rank))
  lost = reached - CheckpointReader(str(tmp_path)).choose()
  assert lost <= EVERY + 4  # some steps were already under way
  again = runs.run(tmp_path, processes=2)
  assert again.status == 0 and runs.difference(tmp_path, clean_pair) == 0, again.output
  assert reached - runs.resumed(again) == lost
  row(f"SIGKILL of process {rank} of 2", f"all ended in {seconds:.1f} s, restart equal to the bit", steps_lost=int(lost))


@pytest.mark.long
def test_a_stopped_process_is_noticed(tmp_path, row):
  """After SIGSTOP a process closes nothing and answers nothing."""
  ended = runs.run(tmp_path, {"SIGSTOP": {"process": 1, "step": 14}}, processes=2, grace=2, overrides=("--config.watchdog=8",))
  seconds = time.time() - (tmp_path / "done-SIGSTOP-1").stat().st_mtime
  stacks = [path for path in tmp_path.glob("stacks-*.txt") if "loop.py" in path.read_text()]
  assert ended.status == distributed.LOST and seconds < 60, ended.output
  row("SIGSTOP of process 1 of 2", f"ended in {seconds:.0f} s (watchdog 8 s), {len(stacks)} stacks written")
  assert stacks


@pytest.mark.long
def test_sigterm_to_one_process_saves_the_same_step_everywhere(clean_pair, tmp_path, row):
  ended = runs.run(tmp_path, {"SIGTERM": {"process": 1, "step": 9}}, processes=2)
  assert ended.status == 75, ended.output
  step = int(runs.weights(tmp_path)["step"])
  alone = shutil.copytree(tmp_path, tmp_path.with_name("alone"))
  again = runs.run(tmp_path, processes=2)
  assert again.status == 0 and runs.difference(tmp_path, clean_pair) == 0, again.output
  lost = runs.steps_lost(ended, again)
  assert lost == 0
  row("SIGTERM to process 1 of 2", f"both saved step {step}, ended with 75, resume equal to the bit", steps_lost=lost)
  other = runs.run(alone)
  difference = runs.difference(alone, clean_pair)
  assert other.status == 0 and runs.steps_lost(ended, other) == 0 and difference < 1e-5, other.output
  row("resumed on 1 process instead of 2", f"largest difference of a parameter {difference:.1e}", steps_lost=0)


@pytest.mark.long
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_batch_that_is_not_a_number(clean, tmp_path, policy, row):
  ended = runs.run(tmp_path, {"nan": {"step": 9}}, overrides=(f"--config.on_bad_step={policy}",))
  assert ended.status == 0, ended.output
  assert ("step 10 skipped" in ended.output) == (policy == "skip")
  assert ("back to step 9, on with other images" in ended.output) == (policy == "rollback")
  end, usual = (runs.records(workdir, "test")[-1]["loss"] for workdir in (tmp_path, clean))
  assert end == pytest.approx(usual, rel=0.1) and runs.records(tmp_path, "train")[-1]["bad_steps"] == 1
  row(f"NaN batch, policy {policy}", f"final loss {end:.4f}, without the fault {usual:.4f}; 1 counted", steps_lost=1)


@pytest.mark.long
def test_a_run_that_is_to_stop_says_where(tmp_path):
  ended = runs.run(tmp_path, {"nan": {"step": 9}})
  assert ended.status == 1 and "error: loss or gradient not finite at step 10: first layer" in ended.output, ended.output
  assert ended.output.splitlines()[-1].endswith("checkpoints/9")


@pytest.mark.long
def test_an_error_in_a_decoding_thread_ends_the_run(tmp_path, row):
  ended = runs.run(tmp_path, {"raise": {"step": 9}})
  assert ended.status == 1 and "ZeroDivisionError" in ended.output and ended.seconds < 120, ended.output
  row("a decoding thread raises", f"ended with its error, status 1, after {ended.seconds:.0f} s in all")


@pytest.mark.long
def test_another_configuration_and_another_schema_are_refused(clean, tmp_path, monkeypatch, row):
  workdir = shutil.copytree(clean, tmp_path / "copy")
  ended = runs.run(workdir, overrides=("--config.seed=1",))
  assert ended.status == 2 and "config.seed was 0, is 1" in ended.output.splitlines()[-1]
  monkeypatch.setattr(manifest, "SCHEMA", 99)
  newest = workdir / "checkpoints" / str(runs.weights(workdir)["step"])
  (newest / manifest.NAME).unlink()
  manifest.write(newest, {"step": int(newest.name)})
  newer = runs.run(workdir)
  assert newer.status == 2 and "schema 99" in newer.output.splitlines()[-1], newer.output
  row("another seed; a newer schema", "refused in words, status 2")
