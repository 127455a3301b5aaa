"""The short form of the faults that launch.chaos injects into checkpoints."""
import pytest

from nfnets.train.checkpoint import CheckpointError, Checkpoints
from tests.faults import checkpoint_faults as faults


def test_killed_at_random_moments_of_a_save_the_newest_finished_step_is_there(tmp_path):
  found = faults.kill_during_saves(tmp_path, 5)
  assert (found.attempts, found.restorable, found.wrong, found.litter) == (5, 5, 0, 0)


def test_one_flipped_bit_is_always_seen(tmp_path):
  found = faults.flip_bits(tmp_path, 60)
  assert found.files >= 10 and (found.silent, found.fallbacks) == (0, found.attempts) and found.attempts == 60


@pytest.mark.parametrize("fault", [faults.truncate_files, faults.delete_files])
def test_files_cut_short_or_gone_are_always_seen(tmp_path, fault):
  found = fault(tmp_path)
  assert found.attempts >= found.files >= 10 and (found.silent, found.fallbacks) == (0, found.attempts)


# Orbax's other writes, which end after the one that failed, find their event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_said_and_survived(tmp_path):
  found = faults.fill_disk(tmp_path / "disk")
  assert found.raised and found.old_intact and found.later_saved and found.litter == 0
  reason = {"tmpfs": "No space left on device", "RLIMIT_FSIZE": "File too large"}[found.how]
  assert found.said.count("\n") == 0 and found.said.startswith("checkpoint of step 2 could not be written to ")
  assert str(tmp_path / "disk") in found.said and reason in found.said


def test_checkpoints_that_all_lost_their_manifests_are_no_reason_to_start_anew(tmp_path):
  assert faults.lost_manifests(tmp_path) == [10, 20]
  with pytest.raises(CheckpointError, match="20: has no manifest.json: unfinished, or the file is lost"):
    Checkpoints(str(tmp_path), keep=2).choose()
