"""Where loops run equal blocks, training holds these stacked; that changes no number, no name and no checkpoint."""

import contextlib
import dataclasses

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from nfnets import optim
from nfnets.agc import agc_metrics
from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.models import layers, loops
from nfnets.train import recovery
from nfnets.train.run import open_run
from nfnets.train.step import sharding
from nfnets.train.step.state import build_network, init_state, split_for_training
from nfnets.train.step.step import train_step_over

RUNS = ((0, 1), (1, 4), (4, 5), (5, 7))
LENGTHS = {"batch": 32, "steps_per_epoch": 20, "total_steps": 40}
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


def prepare(config: Config):
  """Returns (graph, optimizer, state) as training has them."""
  graph, params, stats = split_for_training(build_network(config.model, 10), config)
  optimizer = optim.make_optimizer(config.optim, params, **LENGTHS)
  return graph, optimizer, init_state(params, stats, optimizer, config)


def train(config: Config, devices: int, steps: int = 6):
  """Takes some steps: (the state, the losses)."""
  graph, optimizer, state = prepare(config)
  mesh = sharding.make_mesh(jax.devices()[:devices])
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


@pytest.mark.parametrize("patterns", [("blocks/1/", "blocks/2/", "blocks/3/"), ("blocks/5/", "blocks/6/", "stem/")])
def test_a_pattern_for_each_block_is_as_good_with_loops_as_without(patterns):
  """All blocks of a run are named, so that they are alike, but a stack has the first one's name alone."""
  states = [prepare(make_config(scan, optim=dataclasses.replace(SGD, agc_exclude=patterns)))[2] for scan in (True, False)]
  assert loops.runs_of(states[0].params) == ()
  clipped, expected = (agc_metrics(state.opt_state).keys() for state in states)
  assert clipped == expected and not any(path.startswith(patterns) for path in clipped) and "blocks/4/conv0/kernel" in clipped


@pytest.mark.parametrize(
  "norm", ["nf", "none", "skipinit", "fixup", "weight_norm", "weight_std", "scaled_weight_std", "layer", "dyt"]
)
def test_standardized_stacks_are_those_of_single_blocks(norm):
  config = make_config(True)
  config.model.name, config.model.overrides = "resnet_tiny", {**config.model.overrides, "norm": norm}
  images, features = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), []
  for stack in (True, False):
    network = build_network(config.model, 10)
    assert network.runs == RUNS
    if stack:
      network.stack()
    layers.standardize(network)
    features.append(network.outputs(images)["features"])
  np.testing.assert_allclose(*features, rtol=1e-5, atol=1e-5)


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


def test_a_run_stopped_and_resumed_in_loops_equals_one_that_never_stopped(tmp_path):
  """Frozen parameters have no moments. A checkpoint has every block by its name."""
  config = make_config(True, optim=dataclasses.replace(SGD, frozen=("conv0",)))

  def go_on(run, steps):
    with contextlib.closing(run.batches_from_here()) as batches:
      for _, batch in zip(range(steps), batches, strict=False):
        run.take_step(batch)
    return jax.device_get(run.state)

  with open_run(config, str(tmp_path)) as run:
    assert loops.runs_of(run.state.params) == RUNS[1::2]
    saved = go_on(run, 3)
    run.save()
    run.writer.wait()
    uninterrupted = go_on(run, 2)
    step = run.train_step  # compiled once
  with open_run(config, str(tmp_path)) as run:
    assert run.step == 3 and jax.tree.map(lambda x: x.sharding, run.state) == jax.tree.map(lambda x: x.sharding, run.like)
    chex.assert_trees_all_equal(jax.device_get(run.state), saved)
    run.train_step = step
    chex.assert_trees_all_equal(go_on(run, 2), uninterrupted)
    shapes = run.reader.meta(3)["shapes"]
  name = "blocks/3/conv1/kernel"
  assert shapes["model"][f"params/{name}"] == shapes["ema"][f"params/{name}"] == shapes["model"]["params/blocks/2/conv1/kernel"]
  moments = [path for path in shapes["training"] if "/momentum/" in path]
  assert any(path.endswith(name) for path in moments) and not any("conv0" in path for path in moments)
  params = nnx.state(build_network(make_config(False).model, 10), nnx.Param)
  restored, _ = run.reader.restore_model(3, params, nnx.State({}))["params"]
  chex.assert_trees_all_equal(jax.device_get(restored), loops.unstack(saved.params))


def test_the_layer_of_a_number_that_is_not_finite_is_found_within_a_stack():
  config = make_config(True)
  graph, _, state = prepare(config)
  kernel = state.params["blocks"][1]["conv1"]["kernel"]
  kernel[...] = kernel[...].at[2].set(np.nan)
  assert "blocks/3/conv1/kernel" in recovery.first_nonfinite(config, graph, state, lambda: batch_of(0))
