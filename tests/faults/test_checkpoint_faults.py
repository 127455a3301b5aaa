"""Checkpoints killed, damaged and without a disk to lie on; python -m tests.faults prints the figures in its table."""

import pytest

from nfnets.train.checkpoints.errors import CheckpointError
from nfnets.train.checkpoints.reader import CheckpointReader
from tests.faults import checkpoint_faults as faults


def test_killed_at_random_moments_of_a_save_the_newest_finished_step_is_there(tmp_path, full, row):
  attempts = 50 if full else 3
  found = faults.kill_during_saves(tmp_path, attempts)
  assert (found.attempts, found.restorable, found.wrong, found.litter) == (attempts, attempts, 0, 0)
  row(
    f"kill -9 at {attempts} random moments of a save",
    f"{found.restorable}/{attempts} restorable, {found.wrong} wrong steps, "
    f"{found.litter} litter left; {found.during_write} met a write",
    silent=found.wrong,
  )


def test_one_flipped_bit_is_always_seen(tmp_path, full, row):
  attempts = 200 if full else 60
  found = faults.flip_bits(tmp_path, attempts)
  assert found.files >= 10 and (found.silent, found.fallbacks) == (0, attempts) and found.attempts == attempts
  row(
    f"1 bit flipped at {attempts} offsets of {found.files} files",
    f"{found.silent} silent, {found.fallbacks} fallbacks",
    silent=found.silent,
  )


@pytest.mark.parametrize(
  "fault, name", [(faults.truncate_files, "cut short"), (faults.delete_files, "deleted")], ids=["truncate", "delete"]
)
def test_files_cut_short_or_gone_are_always_seen(tmp_path, fault, name, row):
  found = fault(tmp_path)
  assert found.attempts >= found.files >= 10 and (found.silent, found.fallbacks) == (0, found.attempts)
  row(f"each of {found.files} files {name}", f"{found.silent} silent, {found.fallbacks} fallbacks", silent=found.silent)


# Orbax's other writes, which end after the one that failed, find their event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_said_and_survived(tmp_path, row):
  found = faults.fill_disk(tmp_path / "disk")
  assert found.raised and found.old_intact and found.later_saved and found.litter == 0
  reason = {"tmpfs": "No space left on device", "RLIMIT_FSIZE": "File too large"}[found.how]
  assert found.said.count("\n") == 0 and found.said.startswith("checkpoint of step 2 could not be written to ")
  assert str(tmp_path / "disk") in found.said and reason in found.said
  row(f"disk full during a save ({found.how})", "said in a line, old checkpoint intact, a later save worked")


def test_checkpoints_that_all_lost_their_manifests_are_no_reason_to_start_anew(tmp_path):
  assert faults.lost_manifests(tmp_path) == [10, 20]
  with pytest.raises(CheckpointError, match="20: has no manifest.json: unfinished, or the file is lost"):
    CheckpointReader(str(tmp_path)).choose()
