"""A training step of every optimizer against float64 numpy references, optax and the published code."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nfnets import optim
from nfnets.agc import agc, agc_metrics
from nfnets.config import OptimConfig
from tests import golden as golden_values
from tests.optim_cases import (
  CLASSIFIER,
  LENGTH,
  SHAPES,
  assert_close,
  config_with,
  flatten,
  make,
  make_grads,
  make_params,
  make_state,
  nest,
  reference_lr,
  run,
)

# ---- one training step


def reference_clip(grad, param, config):
  axes = None if param.ndim <= 1 else tuple(range(param.ndim - 1))
  norm = lambda x: np.sqrt((x**2).sum(axis=axes, keepdims=axes is not None))
  limit = config.clipping * np.maximum(norm(param), config.agc_eps)
  return np.where(norm(grad) > limit, grad * limit / np.maximum(norm(grad), 1e-6), grad)


def reference_run(config, params, steps):
  """AGC, weight decay into the gradient, momentum, learning rate and average in float64; returns (parameters, average)."""
  params = {path: value.astype(np.float64) for path, value in flatten(params).items()}
  momentum = {path: np.zeros_like(value) for path, value in params.items()}
  ema = dict(params)
  for step in range(steps):
    grads = {path: value.astype(np.float64) for path, value in flatten(make_grads(step)).items()}
    for path, grad in grads.items():
      if config.clipping is not None and path != "fc/kernel":
        grad = reference_clip(grad, params[path], config)
      if path.endswith("/kernel"):
        grad = grad + config.weight_decay * params[path]
      momentum[path] = config.momentum * momentum[path] + grad
      direction = momentum[path] if config.nesterov is False else grad + config.momentum * momentum[path]
      params[path] = params[path] - reference_lr(config, step, **LENGTH) * direction
      decay = min(config.ema_decay, (1 + step) / (10 + step))
      ema[path] = decay * ema[path] + (1 - decay) * params[path]
  return params, ema


@pytest.mark.parametrize(
  ("kind", "fields"),
  [
    ("dict", {}),
    ("state", {}),
    ("dict", {"nesterov": False}),
    ("dict", {"momentum": 0.0, "ema_decay": 0.3}),
    ("dict", {"clipping": None, "weight_decay": 0.1}),
    ("state", {"weight_decay": 0.1}),
  ],
  ids=str,
)
def test_sgd_and_average_equal_float64_reference(kind, fields):
  config = config_with(**fields)
  params, wrap = make_params(), lambda tree: tree
  if kind == "state":
    params, wrap = make_state(params), make_state
    config.agc_exclude = ()  # the mark alone must spare the classifier
  optimizer = make(config, params)

  @jax.jit
  def step(params, ema, state, grads, count):
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return params, optim.ema_update(ema, params, count, config.ema_decay), state

  got, ema, state = params, params, optimizer.init(params)
  for count in range(6):
    got, ema, state = step(got, ema, state, wrap(make_grads(count)), count)
  want, want_ema = reference_run(config, make_params(), 6)
  plain = lambda tree: nest({path.removesuffix("/value"): leaf for path, leaf in flatten(tree).items()})
  assert_close(plain(got), nest(want))
  assert_close(plain(ema), nest(want_ema))
  assert plain(got)["blocks"]["0"]["skip_gain"] != 0
  assert ("momentum" in state) == (config.momentum > 0) and ("agc" in state) == (config.clipping is not None)


def test_plain_sgd_is_gradient_times_rate():
  config = OptimConfig(momentum=0.0, clipping=None, weight_decay=0.0, schedule="constant", warmup_epochs=0)
  got, _ = run(make(config, make_params()), make_params(), steps=1)
  assert_close(got, jax.tree.map(lambda p, g: p - 0.2 * g, make_params(), make_grads(0)))


def decay_mask(tree):
  return nest({path: path.endswith("/kernel") for path in flatten(tree, convert=id)})


def test_adamw_equals_optax():
  config = OptimConfig(name="adamw", base_lr=0.01, weight_decay=0.05, b1=0.8, b2=0.95, eps=1e-6, clipping=None)
  config.warmup_epochs = 1.0
  schedule = optim.make_schedule(config, **LENGTH)
  reference = optax.adamw(schedule, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.05, mask=decay_mask)
  assert_close(run(make(config, make_params()), make_params())[0], run(reference, make_params())[0])


@pytest.mark.parametrize("nesterov", [None, False, True])
def test_lars_equals_optax(nesterov):
  config = OptimConfig(name="lars", base_lr=2.0, weight_decay=0.01, nesterov=nesterov, clipping=None, warmup_epochs=1.0)
  schedule = optim.make_schedule(config, **LENGTH)
  reference = optax.lars(schedule, 0.01, decay_mask, trust_ratio_mask=decay_mask, nesterov=bool(nesterov))
  assert_close(run(make(config, make_params()), make_params())[0], run(reference, make_params())[0])


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_agc_comes_first_with_every_optimizer(name):
  config = config_with(name=name)
  params = make_params()
  clipped = lambda grads, state, params: make(dataclasses.replace(config, clipping=None), params).update(
    nest(
      {
        path: grad if path == "fc/kernel" else reference_clip(grad, flatten(params)[path], config).astype(np.float32)
        for path, grad in flatten(grads).items()
      }
    ),
    state,
    params,
  )
  without = make(dataclasses.replace(config, clipping=None), params)
  assert_close(run(make(config, params), params)[0], run(without, params, update=clipped)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_sharded_and_jitted_equal_eager(name):
  params = make_params()
  optimizer = make(config_with(name=name), params)
  want, _ = run(optimizer, params, steps=2, update=optimizer.update)
  devices = max(n for n in (1, 2, 4, 8) if n <= jax.device_count())
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))

  def place(tree):
    def put(x):
      whole = x.ndim == 0 or x.shape[-1] % devices
      spec = PartitionSpec() if whole else PartitionSpec(*[None] * (x.ndim - 1), "data")
      return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)

  got, _ = run(optimizer, place(params), steps=2, wrap=place)
  assert_close(got, want)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_low_precision_gradients_keep_a_float32_state(name):
  params = make_params()
  half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
  optimizer = make(config_with(name=name), params)
  got, state = run(optimizer, params, steps=2, wrap=half)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((got, state)) if jnp.issubdtype(x.dtype, jnp.floating))
  assert_close(got, run(optimizer, params, steps=2)[0], rtol=0.05, atol=0.05)


def test_works_inside_multi_steps():
  params = make_params()
  config = config_with(clipping=None)
  accumulated = optax.MultiSteps(make(config, params), every_k_schedule=2)
  state = accumulated.init(params)
  for _ in range(2):
    updates, state = accumulated.update(make_grads(0), state, params)
  direct, _ = make(config, params).update(make_grads(0), make(config, params).init(params), params)
  assert_close(updates, direct)


def test_clipping_is_tracked_under_its_name():
  params = make_state(make_params())
  _, state = run(make(OptimConfig(agc_track=True, warmup_epochs=1), params), params, steps=1, wrap=make_state)
  metrics = agc_metrics(state["agc"])
  assert metrics.keys() == SHAPES.keys() - {"fc/kernel"}
  assert metrics["blocks/0/skip_gain"]["clip_fraction"] == 1


def test_parameters_other_than_it_was_made_for_are_an_error():
  params = make_params()
  optimizer = make(config_with(clipping=None), params)
  with pytest.raises(ValueError, match="made for other parameters; it does not know head/kernel"):
    optimizer.init({**params, "head": {"kernel": jnp.zeros((2, 2))}})


def test_optimizer_needs_shapes_only():
  params = make_params()
  abstract = jax.eval_shape(lambda: params)
  assert_close(run(make(config_with(), abstract), params)[0], run(make(config_with(), params), params)[0])


# ---- the published optimizer


@pytest.fixture(scope="module")
def golden():
  return golden_values.load("optimizer")


def unpack(golden, vector):
  """A vector of tests/golden/optimizer.npz as nested dicts."""
  tree, start = {}, 0
  for path, shape in zip(str(golden["paths"]).split("\n"), str(golden["shapes"]).split("\n"), strict=True):
    shape = tuple(map(int, shape.split("x"))) if shape else ()
    tree[path] = jnp.asarray(vector[start : start + math.prod(shape)].reshape(shape), jnp.float32)
    start += math.prod(shape)
  assert start == vector.size
  return nest(tree)


def test_official_step(golden):
  """Learning rate, parameters and average after every step equal the published optimizer's on the same gradients."""
  config = OptimConfig(base_lr=float(golden["base_lr"]), warmup_epochs=float(golden["warmup_steps"]), agc_exclude=CLASSIFIER)
  length = {"batch": int(golden["batch"]), "steps_per_epoch": 1, "total_steps": int(golden["total_steps"])}
  params = ema = unpack(golden, golden["initial"])
  optimizer, schedule = optim.make_optimizer(config, params, **length), optim.make_schedule(config, **length)

  @jax.jit
  def train_step(params, ema, state, grads, step):
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return params, optim.ema_update(ema, params, step, config.ema_decay), state

  state = optimizer.init(params)
  for step, gradient in enumerate(golden["gradients"]):
    np.testing.assert_allclose(schedule(step), golden["lr"][step], rtol=1e-6)
    params, ema, state = train_step(params, ema, state, unpack(golden, gradient), step)
    assert_close(params, unpack(golden, golden["params"][step]), rtol=1e-6, atol=1e-6)
    assert_close(ema, unpack(golden, golden["ema"][step]), rtol=1e-6, atol=1e-6)


def test_official_clipping():
  """Equals the published AGC on parameters of every kind."""
  golden = golden_values.load("agc")
  params = unpack(golden, golden["params"])
  clip = agc(float(golden["clipping"]), eps=float(golden["eps"]), exclude=CLASSIFIER)
  update = jax.jit(lambda gradient: clip.update(gradient, clip.init(params), params)[0])
  for gradient, clipped in zip(golden["gradients"], golden["clipped"], strict=True):
    assert not np.array_equal(gradient, clipped)
    assert_close(update(unpack(golden, gradient)), unpack(golden, clipped), rtol=1e-6, atol=1e-9)


def test_official_schedule_at_release_scale(golden):
  images, batch = 1281167, 4096
  schedule = optim.make_schedule(OptimConfig(), batch=batch, steps_per_epoch=images / batch, total_steps=images * 360 // batch)
  got = [schedule(int(step)) for step in golden["release_steps"]]
  np.testing.assert_allclose(got, golden["release_lr"], rtol=1e-6, atol=1e-12)
