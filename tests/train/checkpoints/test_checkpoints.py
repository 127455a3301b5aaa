"""Checkpoints give back equal bits on any devices, and those that are to be kept are kept."""

import dataclasses
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nfnets.config import Config
from nfnets.train.checkpoints import compatibility, manifest, retention
from nfnets.train.checkpoints.writer import CheckpointWriter
from nfnets.train.step import sharding
from tests.faults.checkpoint_faults import FACTS, leftovers, like, read, same, save, small_state

# ---- round trips


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("shard", [False, True])
def test_restores_equal_bits_onto_any_number_of_devices(tmp_path, devices, shard):
  """The state is written from 4 devices, sharded; it has leaves of every dtype, an empty array and empty trees."""
  saved = sharding.put(small_state(7), like(4, shard=True))
  writer = CheckpointWriter(str(tmp_path), FACTS, keep=2)
  writer.save(dataclasses.replace(saved, halted=jnp.array(True)))
  writer.close()
  reader = read(tmp_path)
  expected = like(devices, shard=shard)
  restored = reader.restore(reader.choose(), expected)
  assert same(restored, small_state(7))  # in which `halted` is False
  for leaf, shape in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
    assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
  kernel = restored.params["blocks"]["0"]["kernel"]
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
  restored = reader.restore_model(4, like().params, like().stats)
  chex.assert_trees_all_equal(restored, {"params": (state.params, state.stats), "ema": state.ema})
  weights = reader.restore_weights(4, "ema")
  assert set(weights) == {"blocks/0/kernel", "fc/bias"} and weights["fc/bias"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(weights["blocks/0/kernel"], state.ema[0]["blocks"]["0"]["kernel"])


def test_metrics_may_come_after_the_save(tmp_path):
  """The next run evaluates a step that a signal saved; such a step can be the best as any other can."""
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
    "class_names": list("0123456789"),
    "fingerprint": "",
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
  saved = manifests(range(2, 31), metrics)
  assert set(retention.kept(saved, newest=2)) == {29, 30}
  assert retention.kept(saved, newest=1, every=1.0) == {30: ["newest", "every"], 10: ["every"], 20: ["every"]}
  assert retention.kept(saved, newest=1, best="top1") == {30: ["newest"], 3: ["best"]}
  assert retention.kept(saved, newest=1, best="loss") == {30: ["newest"], 14: ["best"]}
  assert set(retention.kept(saved, newest=1, best="ema_top1")) == {30}


def test_deletes_what_is_kept_no_longer_and_says_nothing(tmp_path, said):
  """An epoch has 3.9 steps; a step of every two epochs, the best and the newest stay."""
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
  writer.save(small_state(2))  # by now Orbax has written step 1, which has no manifest yet
  assert not held.is_set() and read(tmp_path).steps() == []
  held.set()
  writer.close()
  assert read(tmp_path).steps() == [1, 2]
