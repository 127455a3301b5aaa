"""Measures against theory, and against any module of a user's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nfnets import lab, models
from nfnets.lab.measures.curvature import top_of_tridiagonal


@pytest.mark.parametrize("size", (5, 60))
def test_sharpness_of_a_known_quadratic(size):
  rng = np.random.default_rng(size)
  rotation, _ = np.linalg.qr(rng.normal(size=(size, size)))
  eigenvalues = np.concatenate([rng.uniform(-9, 3, size - 1), [3.5]])  # the largest in size is negative and must not be taken
  matrix = jnp.asarray(rotation * eigenvalues @ rotation.T, jnp.float32)
  params = {"a": jnp.ones(2), "b": jnp.zeros((size - 2, 1))}

  def loss(params):
    x = jnp.concatenate([params["a"], params["b"].ravel()])
    return 0.5 * x @ matrix @ x

  assert lab.sharpness(loss, params, iterations=60) == pytest.approx(3.5, rel=1e-4)


def test_sharpness_where_all_eigenvalues_are_negative_or_equal():
  assert lab.sharpness(lambda x: -0.5 * jnp.sum(x**2 * jnp.arange(1.0, 6.0)), jnp.ones(5)) == pytest.approx(-1, rel=1e-4)
  assert lab.sharpness(lambda x: jnp.sum(x**2), jnp.ones(7)) == pytest.approx(2, rel=1e-4)
  assert np.isnan(top_of_tridiagonal(np.array([1.0, np.nan]), np.array([1.0, 0.0])))


def test_similarity_of_orthogonal_and_of_equal_features():
  rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))
  apart = jax.jit(lab.similarity)(7.0 * jnp.asarray(rotation, jnp.float32))
  assert float(apart["orthogonality_gap"]) == pytest.approx(0, abs=1e-5)
  assert float(apart["stable_rank"]) == pytest.approx(6, rel=1e-4) == float(apart["effective_rank"])
  assert float(apart["cosine"]) == pytest.approx(0, abs=1e-5)
  alike = jax.jit(lab.similarity)(1e18 * jnp.ones((6, 6)))
  assert float(alike["cosine"]) == pytest.approx(1, rel=1e-5)
  assert float(alike["stable_rank"]) == pytest.approx(1, rel=1e-5) == float(alike["effective_rank"])


def test_ranks_are_bounded():
  """1 ≤ stable rank ≤ effective rank ≤ min(n, d), for any features."""
  for seed, shape in enumerate(((8, 3), (8, 2, 2, 3))):
    values = jax.jit(lab.similarity)(jax.random.normal(jax.random.key(seed), shape) + seed)
    bound = min(shape[0], int(np.prod(shape[1:])))
    assert 1 - 1e-5 <= float(values["stable_rank"]) <= float(values["effective_rank"]) + 1e-5 <= bound + 1e-3


class Own(nnx.Module):
  """A user's module, with a part that remat traces by itself and one that is called twice."""

  def __init__(self, rngs):
    self.first, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
    self.second = nnx.Linear(4, 4, rngs=rngs)

  def __call__(self, x):
    x = self.norm(self.first(x))
    x = nnx.remat(lambda part, x: part(x))(self.second, x)
    return self.second(x)


def test_signal_of_a_module_of_ones_own():
  model, x = Own(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (64, 3)) + 2
  before = jax.tree.map(jnp.copy, nnx.state(model))
  seen = lab.signal(model, x)
  assert list(seen) == ["first", "norm", "second", "second:2", ""]
  first = np.asarray(model.first(x))
  assert seen["first"]["mean"] == pytest.approx(first.mean(), rel=1e-4)
  assert seen["first"]["var"] == pytest.approx(first.var(axis=0).mean(), rel=1e-4)
  assert seen["first"]["mean_sq"] == pytest.approx((first.mean(axis=0) ** 2).mean(), rel=1e-4)
  assert seen["norm"]["var"] == pytest.approx(1, rel=1e-3) and seen[""] == seen["second:2"]
  assert type(model.first) is nnx.Linear and jax.tree.all(jax.tree.map(jnp.array_equal, before, nnx.state(model)))


def test_signal_of_our_networks_agrees_with_their_own_statistics():
  model = models.create("nf_resnet_tiny", 10, depth=(1,), width=(16,), stage_strides=(1,))
  x = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
  seen, own = lab.signal(model, x, train=True), jax.jit(lambda x: models.signal_statistics(model, x, train=True))(x)
  assert seen["blocks/0"]["var"] == pytest.approx(float(own["blocks/0"]["var"]), rel=1e-4)
  assert seen["blocks/0/residual"]["var"] == pytest.approx(float(own["blocks/0"]["residual_var"]), rel=1e-4)


def test_gradient_norms():
  model, x, labels = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (5, 3)), jnp.array([0, 1, 1, 0, 1])
  error = jax.nn.softmax(model(x)) - jax.nn.one_hot(labels, 2)
  norms = lab.gradient_norms(model, x, labels)
  assert norms["kernel"] == pytest.approx(float(jnp.linalg.norm(x.T @ error / 5)), rel=1e-5)
  assert norms["bias"] == pytest.approx(float(jnp.linalg.norm(error.mean(axis=0))), rel=1e-5)


def test_signal_and_gradients_of_a_linen_module():
  """Conv → BatchNorm → the same Dense twice; figures by hand, and gradients of the whole by jax.grad."""
  import flax.linen as linen

  class Net(linen.Module):
    @linen.compact
    def __call__(self, x, train):
      x = linen.BatchNorm(use_running_average=not train, name="norm")(linen.Conv(4, (3, 3), name="conv")(x))
      dense = linen.Dense(4, name="dense")
      return jnp.mean(dense(dense(x)), axis=(1, 2))

  x = jax.random.normal(jax.random.key(0), (6, 5, 5, 3))
  variables = Net().init(jax.random.key(1), x, train=False)
  seen = lab.signal(Net().bind(variables), x, train=True)
  assert list(seen) == ["conv", "norm", "dense", "dense:2", ""]
  assert seen["norm"]["var"] == pytest.approx(1, abs=1e-3) and seen["norm"]["mean_sq"] == pytest.approx(0, abs=1e-6)
  labels = jnp.arange(6) % 4

  def loss(params):
    logits, _ = Net().apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
    return jnp.mean(-jax.nn.log_softmax(logits)[jnp.arange(6), labels])

  expected = jax.tree.map(jnp.linalg.norm, jax.tree.map(jnp.ravel, jax.grad(loss)(variables["params"])))
  norms = lab.gradient_norms(Net().bind(variables), x, labels, train=True)
  assert norms["dense/kernel"] == pytest.approx(float(expected["dense"]["kernel"]), rel=1e-4)
  assert len(norms) == len(jax.tree.leaves(expected))

  class Deep(linen.Module):
    @linen.compact
    def __call__(self, x):
      options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "check_constancy_invariants": False}
      step = linen.scan(lambda layer, x, _: (layer(x), None), length=3, **options)
      return step(linen.Dense(3, name="dense"), x, None)[0]

  variables = Deep().init(jax.random.key(1), x)
  assert list(lab.signal(Deep().bind(variables), x)) == ["dense", ""]  # the mean of its three calls, by the name of one
  with pytest.raises(TypeError, match="bind"):
    lab.signal(Net(), x)
