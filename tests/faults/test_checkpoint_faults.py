"""Checkpoints survive kills, damage and full disks; python -m tests.faults prints the figures in its table."""

import pytest

from nfnets.train.checkpoints.errors import CheckpointError
from nfnets.train.checkpoints.reader import CheckpointReader
from tests.faults import checkpoint_faults as faults


def test_killed_at_random_moments_of_a_save_the_newest_finished_step_is_there(tmp_path, full, row):
  attempts = 50 if full else 3
  kills = faults.kill_during_saves(tmp_path, attempts)
  assert (kills.attempts, kills.restorable, kills.wrong, kills.litter) == (attempts, attempts, 0, 0)
  row(
    f"kill -9 at {attempts} random moments of a save",
    f"{kills.restorable}/{attempts} restorable, {kills.wrong} wrong steps, "
    f"{kills.litter} litter left; {kills.during_write} met a write",
    silent=kills.wrong,
  )


def test_one_flipped_bit_is_always_seen(tmp_path, full, row):
  attempts = 200 if full else 60
  damage = faults.flip_bits(tmp_path, attempts)
  assert damage.files >= 10 and (damage.silent, damage.fallbacks) == (0, attempts) and damage.attempts == attempts
  row(
    f"1 bit flipped at {attempts} offsets of {damage.files} files",
    f"{damage.silent} silent, {damage.fallbacks} fallbacks",
    silent=damage.silent,
  )


@pytest.mark.parametrize(
  "fault, name", [(faults.truncate_files, "cut short"), (faults.delete_files, "deleted")], ids=["truncate", "delete"]
)
def test_files_cut_short_or_gone_are_always_seen(tmp_path, fault, name, row):
  damage = fault(tmp_path)
  assert damage.attempts >= damage.files >= 10 and (damage.silent, damage.fallbacks) == (0, damage.attempts)
  row(f"each of {damage.files} files {name}", f"{damage.silent} silent, {damage.fallbacks} fallbacks", silent=damage.silent)


# Orbax's other writes end after the one that failed, and then find their event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_said_and_survived(tmp_path, row):
  full_disk = faults.fill_disk(tmp_path / "disk")
  assert full_disk.raised and full_disk.old_intact and full_disk.later_saved and full_disk.litter == 0
  reason = {"tmpfs": "No space left on device", "RLIMIT_FSIZE": "File too large"}[full_disk.how]
  assert full_disk.said.count("\n") == 0 and full_disk.said.startswith("checkpoint of step 2 could not be written to ")
  assert str(tmp_path / "disk") in full_disk.said and reason in full_disk.said
  row(f"disk full during a save ({full_disk.how})", "said in a line, old checkpoint intact, a later save worked")


def test_checkpoints_that_all_lost_their_manifests_are_no_reason_to_start_anew(tmp_path):
  assert faults.lost_manifests(tmp_path) == [10, 20]
  with pytest.raises(CheckpointError, match="20: has no manifest.json: unfinished, or the file is lost"):
    CheckpointReader(str(tmp_path)).choose()
