"""The step is the same on 1 and 8 devices and changes nothing once a number is not finite; evaluation is exact with any batch."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nfnets import optim
from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.data.batches.evaluation import EvalBatches
from nfnets.data.batches.training import TrainBatches
from nfnets.data.sources.open import open_source
from nfnets.train import evaluate
from nfnets.train.step import sharding
from nfnets.train.step.gradients import batch_loss, heavier_label, normalise, row_keys
from nfnets.train.step.state import build_network, init_state, split_network
from nfnets.train.step.step import _compiler_options, all_finite, eval_step_over, is_bad, train_step_over


def make_config(model: str) -> Config:
  small = {"width": (16, 32), "depth": (1, 1), "stage_strides": (1, 2)}
  return Config(
    model=ModelConfig(name=model, drop_rate=0.2, overrides=small),
    data=DataConfig(name="digits", shift=1),
    optim=OptimConfig(base_lr=0.2, warmup_epochs=0.1, clipping=0.05, agc_track=True, ema_decay=0.9),
    batch=64,
    epochs=2,
  )


def prepare(config: Config, devices: int):
  """Returns (mesh, step, evaluation step, state, batches) on the first `devices` devices."""
  mesh = sharding.make_mesh(jax.devices()[:devices])
  data = open_source(config.data, config.data.train_split)
  graph, params, stats = split_network(build_network(config.model, 10))
  optimizer = optim.make_optimizer(config.optim, params, batch=config.batch, steps_per_epoch=22, total_steps=44)
  state = init_state(params, stats, optimizer, config)
  like = sharding.place(mesh, state, shard=config.shard)
  return (
    mesh,
    train_step_over(config, mesh, graph, optimizer, like),
    eval_step_over(config, mesh, graph),
    sharding.put(state, like),
    TrainBatches(data, config.data, batch=config.batch, seed=config.seed),
  )


def test_eight_devices_equal_one():
  """Compares losses, weights, statistics and EMA after 4 steps with BatchNorm; test_devices.py compares networks without it."""
  assert jax.device_count() == 8
  finals = []
  for devices in (1, 8):
    mesh, step, _, state, batches = prepare(make_config("resnet_tiny"), devices)
    losses = []
    for i in range(4):
      state, metrics = step(state, sharding.put_batch(mesh, batches[i]))
      losses.append(float(metrics["loss_sum"]))
    finals.append((losses, jax.device_get((state.params, state.stats, state.ema))))
  np.testing.assert_allclose(finals[0][0], finals[1][0], rtol=1e-5)
  # BatchNorm divides by deviations that may be tiny, and so amplifies float32's rounding
  chex.assert_trees_all_close(finals[0][1], finals[1][1], rtol=2e-3, atol=2e-3)


def test_a_step_that_is_not_finite_changes_nothing_and_stays_halted():
  mesh, step, _, state, batches = prepare(make_config("nf_resnet_tiny"), 2)
  state, _ = step(state, sharding.put_batch(mesh, batches[0]))
  before = jax.device_get(state)
  nans = lambda x: jax.device_put(np.full(x.shape, np.nan, np.float32), sharding.replicated(mesh))
  poisoned = dataclasses.replace(state, params=jax.tree.map(lambda x: x, state.params))
  poisoned.params["fc"]["bias"] = jax.tree.map(nans, before.params["fc"]["bias"])
  expected = jax.device_get(poisoned)
  for i in (1, 2):
    poisoned, _ = step(poisoned, sharding.put_batch(mesh, batches[i]))
  after = jax.device_get(poisoned)
  assert bool(after.halted) and int(after.step) == 1
  for field in ("params", "opt_state", "ema"):
    chex.assert_trees_all_equal(getattr(expected, field), getattr(after, field))


def test_all_finite_sees_every_number_that_is_not_and_no_other():
  largest = np.finfo(np.float32).max
  finite = {"a": jnp.full((1000, 1000), largest), "b": jnp.full((3,), -largest), "c": jnp.float32(1e-45), "none": {}}
  assert jax.jit(all_finite)(finite)
  for bad in (np.nan, np.inf, -np.inf):
    for name in ("a", "b", "c"):
      x = np.array(finite[name])
      x.reshape(-1)[-1] = bad
      assert not jax.jit(all_finite)({**finite, name: jnp.asarray(x)})
  assert all_finite({})


def test_a_step_is_bad_where_loss_gradients_parameters_or_statistics_are_not_finite_or_too_large_to_square():
  fine, broken, huge = {"a": jnp.ones(3)}, {"a": jnp.ones(3).at[1].set(jnp.nan)}, {"a": jnp.full(3, 1e30)}
  check = jax.jit(lambda *arguments: is_bad(*arguments)[0])
  assert not check(jnp.float32(1), fine, fine, fine) and not check(jnp.float32(1), fine, fine, huge)
  for loss in (jnp.inf, jnp.nan):
    assert check(jnp.float32(loss), fine, fine, fine)
  for bad in (broken, huge):
    assert check(jnp.float32(1), bad, fine, fine) and check(jnp.float32(1), fine, bad, fine)
  assert check(jnp.float32(1), fine, fine, broken)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
@pytest.mark.parametrize("clipping", [None, 1e3])
def test_no_update_that_the_step_takes_overflows(name, clipping):
  """The largest parameters and gradients whose norms are finite, and the largest rate, decay and momenta that are allowed."""
  config = OptimConfig(name=name, base_lr=1e4, end_lr=1e4, weight_decay=1e3, clipping=clipping, warmup_epochs=0)
  beside = {
    "sgd": {"momentum": 0.999999},
    "lars": {"momentum": 0.999999, "trust_coefficient": 1e4},
    "adamw": {"b1": 0.999999, "b2": 0.999999, "eps": 1e-30},
  }
  config = dataclasses.replace(config, **beside[name])
  largest = np.float32(1.8e19 / np.sqrt(12 + 3))
  params = {"conv": {"kernel": jnp.full((4, 3), largest), "bias": jnp.full(3, -largest)}}
  signs = {"conv": {"kernel": jnp.where(jnp.arange(12).reshape(4, 3) % 2, 1.0, -1.0), "bias": jnp.ones(3)}}
  optimizer = optim.make_optimizer(config, params, batch=1 << 20, steps_per_epoch=1, total_steps=10_000)

  @jax.jit
  def overflows(params, signs):
    def step(carry, number):  # the parameters are put back each time, so that the momenta grow as far as they can
      state, seen = carry
      size = jnp.where(number % 3 == 2, 1e-22, largest)  # tiny ones in between, whose squares underflow
      updates, state = optimizer.update(jax.tree.map(lambda sign: sign * size, signs), state, params)
      after = optax.apply_updates(params, updates)
      return (state, seen | ~all_finite((after, state))), optax.tree.norm(after)

    return jax.lax.scan(step, (optimizer.init(params), jnp.array(False)), jnp.arange(3000))

  (_, seen), norms = overflows(params, signs)
  assert not seen
  assert np.isinf(norms).any() or name != "sgd"  # the norm of what comes out may overflow: then the next step is bad


def test_the_state_is_donated():
  mesh, step, _, state, batches = prepare(make_config("nf_resnet_tiny"), 1)
  before = jax.tree.leaves(state.params)
  step(state, sharding.put_batch(mesh, batches[0]))
  assert all(leaf.is_deleted() for leaf in before)


def test_evaluation_is_exact_on_any_devices_and_batch():
  config = make_config("nf_resnet_tiny")
  data = open_source(config.data, config.data.test_split)
  results = []
  for devices, batch in ((1, 360), (8, 50), (3, 7)):
    mesh, _, eval_step, state, _ = prepare(config, devices)
    progress = []
    batches = EvalBatches(data, config.data, batch=sharding.whole_batch(batch, mesh))
    weights = {"params": (state.params, state.stats), "again": (state.params, state.stats)}
    both = evaluate.evaluate(eval_step, mesh, weights, batches, progress=progress.append)
    assert both["params"] == both["again"]
    results.append(both["params"])
    batches.close()
    assert progress[-1] == results[-1]["count"] == 360
  assert results[0]["top1"] == results[1]["top1"] == results[2]["top1"] and results[0]["top5"] == results[1]["top5"]
  assert [result["loss"] for result in results] == pytest.approx([results[0]["loss"]] * 3, rel=1e-5)
  network = build_network(config.model, 10)
  images, labels = (np.stack(part) for part in zip(*((data[i].image, data[i].label) for i in range(360)), strict=True))
  logits = np.asarray(nnx.jit(lambda network, x: network(normalise(x, config.data)))(network, images), np.float64)
  assert results[0]["top1"] == (logits.argmax(-1) == labels).mean()
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  assert results[0]["loss"] == pytest.approx(-logp[np.arange(360), labels].mean(), rel=1e-5)


def test_a_batch_that_the_devices_cannot_share_is_refused():
  with pytest.raises(ValueError, match="batch=100 is not divisible by the 8 devices; use 96 or 104"):
    sharding.check_batch(100, sharding.make_mesh())


def test_mixed_labels_reach_the_loss():
  config = dataclasses.replace(make_config("nf_resnet_tiny"), label_smoothing=0.0)
  config.model.drop_rate = 0.0
  graph, params, stats = split_network(build_network(config.model, 10))
  data = open_source(config.data, config.data.test_split)
  labels = jnp.asarray([data[i].label for i in range(16)])
  batch, other = {"image": jnp.asarray(np.stack([data[i].image for i in range(8)])), "label": labels[:8]}, labels[8:]
  batch["key"] = row_keys(jax.random.key(0), 8)
  compiled = jax.jit(lambda params, stats, batch: batch_loss(config, graph, params, stats, batch)[0])
  loss = lambda **extra: float(compiled(params, stats, batch | extra))
  mixed = loss(mix_label=other, ratio=jnp.full(8, 0.3))
  assert mixed == pytest.approx(0.3 * loss() + 0.7 * loss(label=other), rel=1e-5)
  assert isinstance(nnx.merge(graph, params, stats), nnx.Module)


def test_top_1_counts_the_label_that_an_image_has_for_the_larger_part():
  batch = {"label": jnp.array([1, 2, 3]), "mix_label": jnp.array([4, 5, 6]), "ratio": jnp.array([0.9, 0.5, 0.2])}
  np.testing.assert_array_equal(heavier_label(batch), [1, 2, 6])
  spread = batch | {name: jax.nn.one_hot(batch[name], 8) for name in ("label", "mix_label")}
  np.testing.assert_array_equal(heavier_label(spread), jax.nn.one_hot(jnp.array([1, 2, 6]), 8))
  assert heavier_label({"label": batch["label"]}) is batch["label"]


@pytest.mark.parametrize("count", [1000, 4095, 4096, 1_000_000], ids=str)
@pytest.mark.parametrize("where", ["alone", "in a loop"])
def test_sums_on_cpus_are_exact_without_trees_of_sums(count, where):
  numbers = np.random.default_rng(0).uniform(0.5, 1.5, size=count).astype(np.float32)
  add_up = jax.jit(
    (lambda x: jnp.sum(x * x)) if where == "alone" else (lambda x: jax.lax.map(lambda i: jnp.sum((x + i) ** 2), jnp.zeros(2))[0]),
    compiler_options=_compiler_options(sharding.make_mesh()),
  )
  assert "reduce-window" not in add_up.lower(numbers).compile().as_text()
  if where == "alone" and count < 4096:
    assert "reduce-window" in jax.jit(lambda x: jnp.sum(x * x)).lower(numbers).compile().as_text()
  np.testing.assert_allclose(add_up(numbers), (numbers.astype(np.float64) ** 2).sum(), rtol=1e-6)


def test_an_option_of_xla_that_the_person_sets_is_left_alone(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=2")
  assert list(_compiler_options(sharding.make_mesh())) == ["xla_disable_hlo_passes"]
  monkeypatch.setenv("XLA_FLAGS", "")
  assert len(_compiler_options(sharding.make_mesh())) == 2
