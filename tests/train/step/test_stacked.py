"""Where loops run equal blocks, training holds these stacked; that changes no number, no name and no checkpoint."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from nfnets import optim
from nfnets.agc import agc_metrics
from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.models import loops
from nfnets.train import recovery
from nfnets.train.run import open_run
from nfnets.train.step import sharding
from nfnets.train.step.state import build_network, init_state, split_for_training
from nfnets.train.step.step import train_step_over

RUNS = ((0, 1), (1, 4), (4, 5), (5, 7))
SGD = OptimConfig(base_lr=0.8, warmup_epochs=0.1, clipping=0.05, agc_track=True, ema_decay=0.9)


def make_config(scan: bool, **changes) -> Config:
  overrides = {"width": (16, 32), "depth": (4, 3), "stage_strides": (1, 2)}
  model = ModelConfig(name="nf_resnet_tiny", drop_rate=0.2, stochastic_depth=0.2, scan=scan, overrides=overrides)
  config = Config(model=model, data=DataConfig(name="digits"), batch=32, epochs=2, optim=SGD)
  return dataclasses.replace(config, **changes)


def batch_of(step: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(step)
  label = rng.integers(0, 10, 32).astype(np.int32)
  image = rng.integers(0, 60, (32, 8, 8, 3)) + 20 * label[:, None, None, None]
  return {"image": image.astype(np.uint8), "label": label}


def train(config: Config, devices: int, steps: int = 6):
  """Takes some steps: (the state, the losses)."""
  graph, params, stats = split_for_training(build_network(config.model, 10), config)
  lengths = {"batch": config.batch, "steps_per_epoch": 20, "total_steps": 40}
  optimizer = optim.make_optimizer(config.optim, params, **lengths)
  mesh, state = sharding.make_mesh(jax.devices()[:devices]), init_state(params, stats, optimizer, config)
  like = sharding.place(mesh, state, shard=config.shard)
  step, state, losses = train_step_over(config, mesh, graph, optimizer, like), sharding.put(state, like), []
  for i in range(steps):
    state, metrics = step(state, sharding.put_batch(mesh, batch_of(i)))
    losses.append(float(metrics["loss_sum"]))
  return jax.device_get(state), losses


@pytest.mark.parametrize(
  "changes, devices",
  [
    ({}, 1),
    ({"shard": True, "accumulate": 2, "optim": dataclasses.replace(SGD, name="adamw", base_lr=0.02, weight_decay=0.1)}, 2),
  ],
)
def test_steps_with_stacked_blocks_are_those_without(changes, devices):
  """Compares losses, parameters, moments, AGC's statistics by name, and averages."""
  (state, losses), (expected, their_losses) = (train(make_config(scan, **changes), devices) for scan in (True, False))
  assert loops.runs_of(state.params) == RUNS[1::2] and loops.runs_of(expected.params) == ()
  np.testing.assert_allclose(losses, their_losses, rtol=1e-5)
  chex.assert_trees_all_close(loops.unstack(state), expected, rtol=1e-4, atol=1e-5)
  clipping = agc_metrics(state.opt_state)
  assert "blocks/3/conv1/kernel" in clipping and clipping.keys() == agc_metrics(expected.opt_state).keys()
  assert len({float(clipping[f"blocks/{i}/conv1/kernel"]["max_ratio"]) for i in (1, 2, 3)}) == 3


@pytest.mark.parametrize(
  "changes, alike",
  [
    ({}, True),
    ({"frozen": ("stem/",), "agc_exclude": ("blocks/4/",)}, True),
    ({"frozen": ("blocks/[0-2]/",)}, False),
    ({"agc_exclude": ("blocks/6/conv0",)}, False),
    ({"layer_decay": 0.9}, False),
    ({"name": "lars"}, False),
  ],
)
def test_blocks_are_stacked_only_where_they_are_updated_alike(changes, alike):
  config = make_config(True, optim=OptimConfig(**changes))
  _, params, _ = nnx.eval_shape(lambda: split_for_training(build_network(config.model, 10), config))
  assert loops.runs_of(params) == (RUNS[1::2] if alike else ())


def test_stacking_can_be_undone_to_the_bit():
  network = build_network(make_config(True).model, 10)
  params = nnx.state(network, nnx.Param)
  assert network.runs == RUNS
  network.stack()
  stacked = nnx.state(network, nnx.Param)
  assert len(jax.tree.leaves(stacked)) < len(jax.tree.leaves(params))
  assert stacked["blocks"][1]["conv0"]["kernel"].shape == (3, *params["blocks"][1]["conv0"]["kernel"].shape)
  chex.assert_trees_all_equal(loops.unstack(stacked), params)
  chex.assert_trees_all_equal(loops.stack(params, RUNS), stacked)


def test_a_checkpoint_has_every_block_by_its_name_and_comes_back_stacked(tmp_path):
  with open_run(make_config(True), str(tmp_path)) as run:
    assert loops.runs_of(run.state.params) == RUNS[1::2]
    saved = jax.device_get(run.state)
    run.save()
    run.writer.wait()
    run.restore(0)
    chex.assert_trees_all_equal(jax.device_get(run.state), saved)
    assert jax.tree.map(lambda x: x.sharding, run.state) == jax.tree.map(lambda x: x.sharding, run.like)
    shapes = run.reader.meta(0)["shapes"]
    assert shapes["model"]["params/blocks/3/conv1/kernel"] == shapes["model"]["params/blocks/2/conv1/kernel"]
    assert "ema" in shapes and "opt_state/momentum/trace/blocks/6/conv1/kernel" in str(shapes["training"])
  network = build_network(make_config(False).model, 10)
  params, stats = nnx.state(network, nnx.Param), nnx.state(network, nnx.BatchStat)
  restored, _ = run.reader.restore_model(0, params, stats)["params"]
  chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(params))


def test_the_layer_of_a_number_that_is_not_finite_is_found_within_a_stack():
  config = make_config(True)
  graph, params, stats = split_for_training(build_network(config.model, 10), config)
  kernel = params["blocks"][1]["conv1"]["kernel"]
  kernel[...] = kernel[...].at[2].set(np.nan)
  optimizer = optim.make_optimizer(config.optim, params, batch=32, steps_per_epoch=20, total_steps=40)
  state = init_state(params, stats, optimizer, config)
  assert "blocks/3/conv1/kernel" in recovery.first_nonfinite(config, graph, state, lambda: batch_of(0))
