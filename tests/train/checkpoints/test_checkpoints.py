"""Checkpoints: equal bits on any devices, what is kept, what is refused in words, errors of the background, several processes."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nfnets.config import Config
from nfnets.train.checkpoints import compatibility, manifest, retention
from nfnets.train.checkpoints.errors import CheckpointError, SaveError
from nfnets.train.checkpoints.reader import CheckpointReader
from nfnets.train.checkpoints.writer import CheckpointWriter
from nfnets.train.step import sharding
from tests.faults.checkpoint_faults import FACTS, leftovers, same, save, small_state

ROOT = pathlib.Path(__file__).resolve().parents[3]


def like(devices: int = 1, *, shard: bool = False):
  return sharding.place(sharding.make_mesh(jax.devices()[:devices]), jax.eval_shape(lambda: small_state(0)), shard=shard)


def read(workdir: pathlib.Path) -> CheckpointReader:
  return CheckpointReader(str(workdir))


@pytest.fixture
def said():
  return []


# ---- round trips


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("shard", [False, True])
def test_restores_equal_bits_onto_any_number_of_devices(tmp_path, devices, shard):
  """Written from 4 devices, sharded: float32, bfloat16, int32 and bool leaves, an empty array, empty trees."""
  saved = sharding.put(small_state(7), like(4, shard=True))
  writer = CheckpointWriter(str(tmp_path), FACTS, keep=2)
  writer.save(dataclasses.replace(saved, halted=jnp.array(True)))
  writer.close()
  reader = read(tmp_path)
  wanted = like(devices, shard=shard)
  found = reader.restore(reader.choose(), wanted)
  assert same(found, small_state(7))  # whose `halted` is False
  for leaf, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
  kernel = found.params["blocks"]["0"]["kernel"]
  assert len(kernel.addressable_shards) == devices
  assert kernel.addressable_shards[0].data.shape[-1] == (64 // devices if shard else 64)


def test_what_is_saved_is_the_state_at_that_moment_though_its_buffers_are_given_away(tmp_path):
  everywhere = NamedSharding(sharding.make_mesh(), PartitionSpec())
  state = jax.device_put(small_state(3), everywhere)
  ruin = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 if x.dtype != bool else ~x, state), donate_argnums=0)
  writer = CheckpointWriter(str(tmp_path), FACTS, keep=1)
  writer.save(state)
  for _ in range(5):
    state = ruin(state)
  writer.close()
  assert same(read(tmp_path).restore(3, like()), small_state(3))


def test_evaluation_reads_model_and_average_alone_and_the_host_their_names(tmp_path):
  save(tmp_path, 4)
  reader, state = read(tmp_path), small_state(4)
  found = reader.restore_model(4, like().params, like().stats)
  assert set(found) == {"params", "ema"}
  for name, wanted in (("params", (state.params, state.stats)), ("ema", state.ema)):
    chex.assert_trees_all_equal(found[name], wanted)
  weights = reader.restore_weights(4, "ema")
  assert set(weights) == {"blocks/0/kernel", "fc/bias"} and weights["fc/bias"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(weights["blocks/0/kernel"], state.ema[0]["blocks"]["0"]["kernel"])


def test_metrics_may_come_after_the_save(tmp_path):
  """A step that a signal saved is evaluated by the next run; it counts for the best one as any other."""
  writer = CheckpointWriter(str(tmp_path), FACTS, keep=1, keep_best="top1")
  for step, results in ((1, None), (2, {"params": {"top1": 0.25}}), (3, None)):
    writer.save(small_state(step), results=results)
    writer.wait()
    if step == 1:
      assert read(tmp_path).metrics(1) is None
      writer.add_metrics(1, {"params": {"top1": 0.5}, "ema": {"top1": 0.125}})
      assert read(tmp_path).metrics(1) == {"top1": 0.5, "ema_top1": 0.125} and read(tmp_path).verify(1) == []
  writer.close()
  assert read(tmp_path).steps() == [1, 3]


def test_meta_says_what_wrote_it(tmp_path):
  writer = CheckpointWriter(str(tmp_path), FACTS, keep=1, keep_best="loss")
  writer.save(small_state(4), results={"params": {"top1": 0.5, "loss": 1.0}, "ema": {"top1": 0.75, "loss": 0.5}})
  writer.close()
  meta = read(tmp_path).meta(4)
  assert meta["config"] == compatibility.to_json(Config()) and (meta["step"], meta["num_classes"], meta["schema"]) == (
    4,
    10,
    manifest.SCHEMA,
  )
  assert meta["data"] == {
    "seed": 0,
    "records": 1000,
    "next_step": 4 + int(small_state(4).passed_over),
    "shuffle_block": 1,
    "rows": None,
    "ascent_rows": None,
    "order_digest": "",
    "corrupt": [],
  }
  assert meta["rng"] == {"seed": 0, "implementation": "threefry2x32"} and (meta["processes"], meta["devices"]) == (1, 8)
  assert set(meta["versions"]) == {"nfnets", "jax", "jaxlib", "flax", "orbax", "optax", "numpy", "python"}
  assert read(tmp_path).metrics(4) == {"top1": 0.5, "loss": 1.0, "ema_top1": 0.75, "ema_loss": 0.5}
  assert meta["epoch"] == 4 * 256 / 1000 and "halted" not in meta["shapes"]["training"]
  body = manifest.read(writer.path(4))
  files = {path.relative_to(writer.path(4)).as_posix() for path in writer.path(4).rglob("*") if path.is_file()}
  assert set(body["files"]) == files - {"manifest.json"}


# ---- what is kept


def manifests(steps: range, metrics: dict[int, dict[str, float]]) -> list[dict]:
  return [{"step": step, "epoch": step / 10, "metrics": metrics.get(step)} for step in steps]


def test_kept_are_the_newest_one_of_each_period_and_the_best():
  metrics = {3: {"top1": 0.9, "loss": 2.0}, 14: {"top1": 0.8, "loss": 0.1}, 17: {"top1": float("nan"), "loss": float("nan")}}
  found = manifests(range(2, 31), metrics)
  assert set(retention.kept(found, newest=2)) == {29, 30}
  assert retention.kept(found, newest=1, every=1.0) == {30: ["newest", "every"], 10: ["every"], 20: ["every"]}
  assert retention.kept(found, newest=1, best="top1") == {30: ["newest"], 3: ["best"]}
  assert retention.kept(found, newest=1, best="loss") == {30: ["newest"], 14: ["best"]}
  assert set(retention.kept(found, newest=1, best="ema_top1")) == {30}


def test_deletes_what_is_kept_no_longer_and_says_nothing(tmp_path, said):
  """3.9 steps an epoch: one of each epoch stays, the best stays, beside the newest."""
  writer = CheckpointWriter(str(tmp_path), FACTS, keep=1, keep_every=2.0, keep_best="ema_top1", say=said.append)
  for step in range(1, 13):
    writer.save(small_state(step), results={"params": {}, "ema": {"top1": 0.9 if step == 3 else 0.1}})
  writer.close()
  assert read(tmp_path).steps() == [3, 8, 12] and leftovers(tmp_path) == [] and said == []


def test_a_step_that_is_there_is_left_alone(tmp_path):
  writer = CheckpointWriter(str(tmp_path), FACTS, keep=1)
  writer.save(small_state(5))
  writer.save(small_state(5))
  writer.wait()
  before = (writer.path(5) / "manifest.json").stat().st_mtime_ns
  again = CheckpointWriter(str(tmp_path), FACTS, keep=1)
  again.go_on_from(5)
  again.save(small_state(5))
  again.close()
  assert (writer.path(5) / "manifest.json").stat().st_mtime_ns == before


def test_training_does_not_wait_for_hashing(tmp_path, monkeypatch):
  held, write = threading.Event(), manifest.write
  monkeypatch.setattr(manifest, "write", lambda *arguments: held.wait(20) and write(*arguments))
  writer = CheckpointWriter(str(tmp_path), FACTS, keep=2)
  writer.save(small_state(1))
  writer.save(small_state(2))  # Orbax has written 1, which has no manifest yet
  assert not held.is_set() and read(tmp_path).steps() == []
  held.set()
  writer.close()
  assert read(tmp_path).steps() == [1, 2]


# ---- falling back and refusing


def flip(path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


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
  reader, wanted = read(tmp_path), like()
  other = dataclasses.replace(wanted, params={**wanted.params, "fc": {"bias": jax.ShapeDtypeStruct((8,), jnp.float32)}})
  differs = r"another network: 1 arrays differ: params/fc/bias \(saved bfloat16 \(8,\), expected float32 \(8,\)\)"
  with pytest.raises(CheckpointError, match=differs):
    reader.restore(1, other)
  with pytest.raises(CheckpointError, match=r"another training state: 1 arrays .*opt_state/count .* expected not there"):
    reader.restore(1, dataclasses.replace(wanted, opt_state={k: v for k, v in wanted.opt_state.items() if k != "count"}))
  with pytest.raises(CheckpointError, match="another ema state"):
    reader.restore(1, dataclasses.replace(wanted, ema=None))


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
  writer.save(small_state(2))  # the same step once more
  writer.wait()
  assert read(tmp_path).choose() == 2 and len(said) == 1


def test_the_end_of_a_run_raises_if_its_last_save_failed(tmp_path, said):
  writer = CheckpointWriter(str(tmp_path), FACTS, keep=3, say=said.append)
  (tmp_path / "checkpoints" / "2").write_text("a file where a directory should be")
  writer.save(small_state(2))
  with pytest.raises(SaveError, match="step 2 could not be written"):
    writer.wait()
  writer.close()  # said once is enough
  assert len(said) == 1


def test_a_failed_save_does_not_hide_the_error_that_ended_the_run(tmp_path, said):
  writer = CheckpointWriter(str(tmp_path), FACTS, keep=3, say=said.append)
  (tmp_path / "checkpoints" / "2").write_text("a file where a directory should be")
  writer.save(small_state(2))
  writer.close(after_an_error=True)
  assert len(said) == 1 and "step 2 could not be written" in said[0]


# ---- processes

PROGRAM = """
import sys
import jax
port, index, workdir = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
from jax.experimental import multihost_utils
from nfnets.train.checkpoints.reader import CheckpointReader
from nfnets.train.checkpoints.writer import CheckpointWriter
from nfnets.train.step import sharding
from tests.faults.checkpoint_faults import FACTS, small_state
from tests.train.checkpoints.test_checkpoints import flip
like = sharding.place(sharding.make_mesh(), jax.eval_shape(lambda: small_state(0)), shard=True)
say = lambda line: print(f"said by {index}: {line}", flush=True)
checkpoints = CheckpointWriter(workdir, FACTS, keep=3, say=say)
assert CheckpointReader(workdir, say=say).choose() is None
for step in (1, 2, 3):
  checkpoints.save(sharding.put(small_state(step), like))
checkpoints.close()
multihost_utils.sync_global_devices("all written")
if index == "0":
  flip(checkpoints.path(3) / "meta" / "metadata")
checkpoints = CheckpointWriter(workdir, FACTS, keep=2, say=say)
reader = CheckpointReader(workdir, say=say)
state = reader.restore(reader.choose(), like)
checkpoints.go_on_from(int(state.step))
print(f"process {index} goes on from {int(state.step)}", flush=True)
checkpoints.save(sharding.put(small_state(4), like))
checkpoints.close()
"""


def test_two_processes_write_one_checkpoint_and_agree_on_what_to_restore(tmp_path):
  """Sharded over 2 × 2 devices; the newest is damaged in between; at last read by one process with 8 devices."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  both = [
    subprocess.Popen(
      [sys.executable, "-c", PROGRAM, str(port), str(index), str(tmp_path)],
      env=environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )
    for index in range(2)
  ]
  try:
    out = "\n".join(process.communicate(timeout=120)[0] for process in both)
  finally:
    for process in both:
      process.kill()
  assert [process.returncode for process in both] == [0, 0], out
  assert "process 0 goes on from 2" in out and "process 1 goes on from 2" in out
  assert out.count("is damaged: its SHA-256 is another") == 1 and "said by 0: checkpoint" in out
  reader = read(tmp_path)
  assert reader.steps() == [2, 4] and leftovers(tmp_path) == ["3.aside"] and reader.meta(4)["processes"] == 2
  assert reader.choose() == 4 and same(reader.restore(4, like(8, shard=True)), small_state(4))
