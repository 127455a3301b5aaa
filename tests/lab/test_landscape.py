"""Measures along the training: internal covariate shift, landscapes, and theorem 4.1, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets import lab


def test_covariate_shift_of_a_linear_network_in_closed_form():
  """L = (w2 w1 x - y)² / 2: moving w1 changes the gradient of w2, r w1 x with r = w2 w1 x - y, as this formula says."""
  x, y, rate = 1.5, 0.7, 0.1
  loss = lambda params: 0.5 * (params["b"]["k"] * params["a"]["k"] * x - y) ** 2
  before = {"a": {"k": jnp.array(0.9)}, "b": {"k": jnp.array(-1.2)}}
  after = jax.tree.map(lambda p, g: p - rate * g, before, jax.grad(loss)(before))
  found = jax.jit(lambda b, a: lab.covariate_shift(loss, b, a, {"a": {"k": 0}, "b": {"k": 1}}))(before, after)
  w1, w2, moved = 0.9, -1.2, float(after["a"]["k"])
  gradient, shifted = (w2 * w1 * x - y) * w1 * x, (w2 * moved * x - y) * moved * x
  np.testing.assert_allclose(found["shift"], [0, abs(gradient - shifted)], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found["norm"], [abs((w2 * w1 * x - y) * w2 * x), abs(gradient)], rtol=1e-5)
  np.testing.assert_allclose(found["cosine"], [1, np.sign(gradient * shifted)], rtol=1e-5)


def test_layers_are_numbered_by_the_lists_that_they_stand_in():
  params = {"convs": {0: {"kernel": 1}, 1: {"kernel": 1}}, "fc": {"bias": 1}}
  assert lab.layer_numbers(params) == {"convs": {0: {"kernel": 0}, 1: {"kernel": 1}}, "fc": {"bias": 2}}


def test_smoothness_along_the_gradient_of_a_quadratic():
  """For L = xᵀ A x / 2 the gradient changes by step · A g; with A = c I the effective β is c."""
  found = jax.jit(lambda x: lab.along_gradient(lambda x: 1.5 * jnp.sum(x**2), x, jnp.array([0.1, 0.2])))(jnp.array([1.0, -2.0]))
  assert float(found["smoothness"]) == pytest.approx(3, rel=1e-5)
  assert float(found["change"]) == pytest.approx(0.2 * 3 * float(found["gradient"]), rel=1e-5)
  np.testing.assert_allclose([found["highest"], found["lowest"]], [7.5 * 0.7**2, 7.5 * 0.4**2], rtol=1e-5)


def test_batch_sharpness_is_the_hessian_along_each_batches_gradient():
  """L = ⟨a, x²⟩ / 2 of a batch a: g = a x, gᵀ H g / gᵀ g = Σ a³ x² / Σ a² x²."""
  a, x = jnp.array([[1.0, 2.0], [3.0, 0.5]]), jnp.array([1.0, -2.0])
  found = lab.batch_sharpness(lambda x, a: 0.5 * jnp.sum(a * x**2), x, a)
  expected = np.mean([np.sum(row**3 * x**2) / np.sum(row**2 * x**2) for row in np.asarray(a)])
  assert float(found) == pytest.approx(expected, rel=1e-5)


def test_random_directions_are_as_long_as_the_filters():
  params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 5)), "bias": jnp.ones(5)}
  direction = lab.filter_direction(params, jax.random.key(1))
  lengths = lambda kernel: np.linalg.norm(np.asarray(kernel).reshape(-1, 5), axis=0)
  np.testing.assert_allclose(lengths(direction["kernel"]), lengths(params["kernel"]), rtol=1e-5)
  assert not np.any(direction["bias"]) and np.abs(direction["kernel"] - params["kernel"]).max() > 0.1


def test_a_plane_has_the_loss_itself_in_its_middle():
  params, places = {"kernel": jnp.arange(6.0).reshape(2, 3)}, jnp.array([-1.0, 0.0, 1.0])
  loss = lambda params: jnp.sum(params["kernel"] ** 2)
  found = lab.plane(loss, params, jax.random.key(0), places)
  assert found.shape == (3, 3) and float(found[1, 1]) == 55 and float(found[0, 1]) != float(found[2, 1])


def test_stacked_blocks_have_filters_of_their_own():
  """The second block's kernel is ten times the first one's, and so is its direction; gains, a number a channel, do not move."""
  kernel = jax.random.normal(jax.random.key(0), (1, 3, 3, 4, 5)) * jnp.array([1.0, 10.0])[:, None, None, None, None]
  params = {"blocks": [{"kernel": kernel, "gain": jnp.ones((2, 5))}], "fc": {"kernel": jnp.ones((4, 10))}}
  direction = lab.filter_direction(params, jax.random.key(1), stacked="^blocks/")
  length = lambda x: np.linalg.norm(np.asarray(x).reshape(2, 36, 5), axis=1)
  np.testing.assert_allclose(length(direction["blocks"][0]["kernel"]), length(kernel), rtol=1e-5)
  assert not np.any(direction["blocks"][0]["gain"]) and np.any(direction["fc"]["kernel"])
  assert np.any(lab.filter_direction(params, jax.random.key(1))["blocks"][0]["gain"])


@pytest.mark.parametrize("epsilon", (0.0, 0.1))
def test_theorem_4_1(epsilon):
  """Equality without an epsilon, the inequality with one, for any gradient from outside."""
  keys = jax.random.split(jax.random.key(0), 3)
  outer, y = 3 * jax.random.normal(keys[0], (64, 5)), 2 * jax.random.normal(keys[1], (64, 5)) + 1
  scale = jax.random.normal(keys[2], (5,))
  left, right = (np.asarray(side) for side in jax.jit(lab.batch_norm_bound, static_argnums=3)(outer, y, scale, epsilon))
  if epsilon:
    assert (left <= right * (1 + 1e-4)).all() and (left < 0.9999 * right).any()
  else:
    np.testing.assert_allclose(left, right, rtol=1e-4)


def test_theorem_4_1_against_the_layer_itself():
  """The left side is the squared gradient of a loss behind γ ŷ + β with respect to y."""
  key = jax.random.key(3)
  y, target, scale = jax.random.normal(key, (32, 2)), jax.random.normal(jax.random.key(4), (32, 2)), jnp.array([0.5, 2.0])

  def normalized(y):
    return scale * (y - y.mean(axis=0)) / jnp.sqrt(y.var(axis=0) + 1e-3)

  loss = lambda z: jnp.sum((z - target) ** 2)
  left, _ = lab.batch_norm_bound(jax.grad(loss)(normalized(y)), y, scale, 1e-3)
  np.testing.assert_allclose(left, np.sum(np.asarray(jax.grad(lambda y: loss(normalized(y)))(y)) ** 2, axis=0), rtol=1e-4)
