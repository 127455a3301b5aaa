"""Damaged, unfinished, older and other checkpoints are passed over or refused in words; a save that fails is said in a line."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from nfnets.train.checkpoints import manifest
from nfnets.train.checkpoints.errors import CheckpointError, SaveError
from nfnets.train.checkpoints.reader import CheckpointReader
from nfnets.train.checkpoints.writer import CheckpointWriter
from tests.faults.checkpoint_faults import FACTS, flip, leftovers, like, read, same, save, small_state

# ---- falling back and refusing


def test_a_run_goes_on_from_the_newest_good_step_and_sets_the_bad_ones_aside(tmp_path, said):
  save(tmp_path, 1, 2, 3)
  for step in (2, 3):
    flip(tmp_path / "checkpoints" / str(step) / "meta" / "metadata")
  writer = CheckpointWriter(str(tmp_path), FACTS, keep=3, say=said.append)
  assert CheckpointReader(str(tmp_path), say=said.append).choose() == 1
  assert len(said) == 2 and all("meta/metadata is damaged: its SHA-256 is another; taking " in line for line in said)
  writer.go_on_from(1)
  assert leftovers(tmp_path) == ["2.aside", "3.aside"] and read(tmp_path).steps() == [1] and "3.aside" in said[-1]
  writer.save(small_state(2))
  writer.close()
  assert read(tmp_path).choose() == 2 and same(read(tmp_path).restore(2, like()), small_state(2))


def test_no_good_checkpoint_is_an_error_none_at_all_is_not(tmp_path):
  assert read(tmp_path).choose() is None and not (tmp_path / "checkpoints").exists()
  save(tmp_path, 1, 2)
  for step in (1, 2):
    flip(tmp_path / "checkpoints" / str(step) / "model" / "manifest.ocdbt")
  CheckpointWriter(str(tmp_path), FACTS, keep=2).close()
  with pytest.raises(CheckpointError, match=r"no good checkpoint: \S+2: model/manifest.ocdbt is damaged.*1: model/"):
    read(tmp_path).choose()
  with pytest.raises(CheckpointError, match="model/manifest.ocdbt is damaged"):
    read(tmp_path).restore(2, like())


def test_litter_is_removed_by_the_next_run_and_never_by_a_reader(tmp_path, said):
  save(tmp_path, 1, 2)
  directory = tmp_path / "checkpoints"
  for name in ("3.orbax-checkpoint-tmp", "3.orbax-checkpoint-tmp-17", "0.deleted"):
    (directory / name / "model").mkdir(parents=True)
  (directory / "2" / "manifest.json").unlink()
  litter = ["0.deleted", "2", "3.orbax-checkpoint-tmp", "3.orbax-checkpoint-tmp-17"]
  reader = CheckpointReader(str(tmp_path), say=said.append)
  assert reader.choose() == 1 and "2 is not good: has no manifest.json" in said[0] and leftovers(tmp_path) == litter
  CheckpointWriter(str(tmp_path), FACTS, keep=2, say=said.append).close()
  assert leftovers(tmp_path) == [] and all(name in said[1] for name in litter)


def test_a_first_save_that_was_killed_is_no_reason_to_refuse(tmp_path, said):
  save(tmp_path, 1)
  (tmp_path / "checkpoints" / "1" / "manifest.json").unlink()
  CheckpointWriter(str(tmp_path), FACTS, keep=2, say=said.append).close()
  assert read(tmp_path).choose() is None and "removed what a run that was killed left" in said[0]


def rewrite(path: pathlib.Path, **changes) -> None:
  body = {**manifest.read(path), **changes}
  (path / "manifest.json").write_text(manifest._render(body))


def test_newer_and_older_schemas_are_refused_in_words(tmp_path):
  save(tmp_path, 1, 2)
  rewrite(tmp_path / "checkpoints" / "2", schema=9, versions={"nfnets": "4.2"})
  with pytest.raises(CheckpointError, match=f"written by nfnets 4.2, schema 9; this is schema {manifest.SCHEMA}: update nfnets"):
    read(tmp_path).choose()
  old = tmp_path / "old" / "checkpoints" / "5" / "meta"
  old.mkdir(parents=True)
  (old / "metadata").write_text(json.dumps({"step": 5, "config": {}, "versions": {"nfnets": "0.1.0"}}))
  with pytest.raises(CheckpointError, match="no manifest.json and no schema: an older nfnets wrote it"):
    read(tmp_path / "old").choose()
  CheckpointWriter(str(tmp_path / "old"), FACTS, keep=2).close()
  assert (old / "metadata").exists()
  (tmp_path / "checkpoints" / "1").rename(tmp_path / "checkpoints" / "3")
  assert read(tmp_path).verify(3) == ["holds step 1, not what its name says"]


def test_another_network_or_state_is_refused_with_what_differs(tmp_path):
  save(tmp_path, 1)
  reader, expected = read(tmp_path), like()
  other = dataclasses.replace(expected, params={**expected.params, "fc": {"bias": jax.ShapeDtypeStruct((8,), jnp.float32)}})
  differs = r"another network: 1 arrays differ: params/fc/bias \(saved bfloat16 \(8,\), expected float32 \(8,\)\)"
  with pytest.raises(CheckpointError, match=differs):
    reader.restore(1, other)
  with pytest.raises(CheckpointError, match=r"another training state: 1 arrays .*opt_state/count .* expected not there"):
    reader.restore(1, dataclasses.replace(expected, opt_state={k: v for k, v in expected.opt_state.items() if k != "count"}))
  with pytest.raises(CheckpointError, match="another ema state"):
    reader.restore(1, dataclasses.replace(expected, ema=None))


# ---- errors of the background


def test_an_error_in_the_background_is_one_line_and_the_next_save_works(tmp_path, said, monkeypatch):
  writer, write = CheckpointWriter(str(tmp_path), FACTS, keep=3, say=said.append), manifest.write
  writer.save(small_state(1))
  writer.wait()

  def denied(*_):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(manifest, "write", denied)
  writer.save(small_state(2))
  writer.settle()
  assert read(tmp_path).steps() == [1] and leftovers(tmp_path) == []
  assert said == [
    f"checkpoint of step 2 could not be written to {tmp_path}/checkpoints: Permission denied; the checkpoints "
    "before it are untouched, training goes on"
  ]
  monkeypatch.setattr(manifest, "write", write)
  writer.save(small_state(2))  # the same step is tried once more
  writer.wait()
  assert read(tmp_path).choose() == 2 and len(said) == 1


def test_the_end_of_a_run_raises_if_its_last_save_failed(tmp_path, said):
  writer = CheckpointWriter(str(tmp_path), FACTS, keep=3, say=said.append)
  (tmp_path / "checkpoints" / "2").write_text("a file where a directory should be")
  writer.save(small_state(2))
  with pytest.raises(SaveError, match="step 2 could not be written"):
    writer.wait()
  writer.close()  # does not say it a second time
  assert len(said) == 1


def test_a_failed_save_does_not_hide_the_error_that_ended_the_run(tmp_path, said):
  writer = CheckpointWriter(str(tmp_path), FACTS, keep=3, say=said.append)
  (tmp_path / "checkpoints" / "2").write_text("a file where a directory should be")
  writer.save(small_state(2))
  writer.close(after_an_error=True)
  assert len(said) == 1 and "step 2 could not be written" in said[0]
