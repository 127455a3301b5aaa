"""Normalizers by name: what they compute, their running statistics, and networks that have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nfnets import models
from nfnets.errors import UserError
from nfnets.models import layers, norms

X = 3 * jax.random.normal(jax.random.key(0), (8, 4, 4, 6)) * jnp.arange(1, 7) + 5
NAMES = ("batch", "group:3", "layer", "instance", "ghost:4", "lp:1", "lp:2", "lp:inf", "dyt", "derf")
RUNNING = ("batch", "ghost:4", "lp:1", "lp:2", "lp:inf")
make = lambda name: norms.make_norm(name, 6, dtype=jnp.float32, rngs=layers.ParamKeys(jax.random.key(1)))


@pytest.mark.parametrize("name", NAMES)
def test_running_statistics_become_those_of_the_data(name):
  """After a hundred steps on the same images evaluation gives what training gives; ghosts only about that."""
  module = make(name)
  first = norms.normalize(module, X, True)
  before = norms.normalize(make(name), X, False)
  for _ in range(100):
    norms.normalize(module, X, True)
  after = norms.normalize(module, X, False)
  if name in RUNNING:
    assert np.abs(before - first).max() > 0.5
    np.testing.assert_allclose(after, first, atol=0.5 if name.startswith("ghost") else 1e-3)
  else:
    np.testing.assert_array_equal(before, first)
  assert bool(jax.tree.leaves(nnx.state(module, nnx.BatchStat))) == (name in RUNNING)


def test_deviations_are_1():
  centred = lambda y: np.asarray(y) - np.asarray(y).mean(axis=(0, 1, 2))
  out = {name: centred(norms.normalize(make(name), X, True)) for name in ("lp:1", "lp:2", "lp:inf", "batch")}
  np.testing.assert_allclose(np.abs(out["lp:1"]).mean(axis=(0, 1, 2)), 1, rtol=1e-4)
  np.testing.assert_allclose(np.abs(out["lp:inf"]).max(axis=(0, 1, 2)), 1, rtol=1e-4)
  np.testing.assert_allclose(out["lp:2"], out["batch"], atol=1e-4)
  ghosts = np.asarray(norms.normalize(make("ghost:4"), X, True)).reshape(2, 4, 4, 4, 6)
  np.testing.assert_allclose(ghosts.mean(axis=(1, 2, 3)), 0, atol=1e-5)
  np.testing.assert_allclose(ghosts.std(axis=(1, 2, 3)), 1, rtol=1e-3)
  np.testing.assert_allclose(norms.normalize(make("dyt"), X, True), np.tanh(0.5 * np.asarray(X)), atol=1e-5)


@pytest.mark.parametrize(
  ("name", "length"),
  (("weight_norm", lambda w: (np.linalg.norm(w, axis=0), 1)), ("weight_std", lambda w: (w.std(axis=0), 1)))
  + (("scaled_weight_std", lambda w: (w.std(axis=0) * len(w) ** 0.5, 1)),),
)
def test_kernels(name, length):
  conv = norms.conv_of(name)(5, 4, 3, rngs=layers.ParamKeys(jax.random.key(0)))
  found, expected = length(np.asarray(conv.weight(), np.float64).reshape(-1, 4))
  np.testing.assert_allclose(found, expected, rtol=1e-3)
  if name != "weight_norm":
    conv.kernel[...] = 5 * conv.kernel[...] + 1
    before = conv.weight()
    layers.standardize(nnx.List([conv]))
    np.testing.assert_allclose(conv.weight(), before, rtol=1e-5)


FAMILIES = ("resnet", "skipinit_resnet", "fixup_resnet", "nf_resnet")
SMALL = {"depth": (1, 1), "width": (32, 64), "stage_strides": (1, 1)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", (*(name for name in norms.NUMBERS if name not in ("fixup", "nf")), "group:4"))
def test_every_resnet_of_the_zoo_takes_every_name(name, family):
  """Abstractly, which costs nothing: parameters, shapes, and one normalizer or none in each place."""
  norm = {"ghost": "ghost:2", "lp": "lp:1"}.get(name, name)
  network = nnx.eval_shape(lambda: models.create(f"{family}_tiny", 10, norm=norm, **SMALL))
  block = network.blocks[0]
  assert (block.norm0 is None) == (name not in (*norms.ON_ACTIVATIONS, "group:4")) == (block.conv0.bias is not None)
  assert type(block.conv1) is norms.conv_of(norm) and (block.activation.gamma != 1) == (norm == "scaled_weight_std")
  assert (block.skip_gain is not None) == norm.startswith("skipinit")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
  ("norm", "same"),
  [("batch", "resnet_tiny"), ("skipinit", "skipinit_resnet_tiny"), ("fixup", "fixup_resnet_tiny"), ("nf", "nf_resnet_tiny")],
)
def test_a_name_makes_the_network_that_is_called_so(norm, same, family):
  """Every number and the answer are equal; `describe` says which it is."""
  one, other = models.create(f"{family}_tiny", 4, norm=norm, **SMALL), models.create(same, 4, **SMALL)
  assert type(one) is type(other)
  jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(one)), nnx.to_pure_dict(nnx.state(other)))
  images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  pooled = [nnx.jit(lambda network: network.outputs(images)["pool"])(network) for network in (one, other)]
  np.testing.assert_array_equal(*pooled)
  described = str(models.describe(f"{family}_tiny", 4, norm=norm, **SMALL)).splitlines()
  assert described[0].endswith(f"norm={norm}")
  assert described[1:] == str(models.describe(same, 4, **SMALL)).splitlines()[1:]


def test_skipinits_gains_begin_at_0_or_1_over_the_root_of_the_number_of_blocks():
  gains = lambda norm: [float(block.skip_gain[...]) for block in models.create("resnet_tiny", 4, norm=norm, **SMALL).blocks]
  assert gains("skipinit") == [0, 0]
  np.testing.assert_allclose(gains("skipinit_root"), 0.5**0.5, rtol=1e-6)


@pytest.mark.parametrize("norm", ("lp:1", "weight_std", "derf"))
def test_networks_train(norm):
  """Gradients are finite and reach the stem."""
  network = models.create("resnet_tiny", 4, norm=norm, depth=(1,), width=(32,), stage_strides=(1,))
  network.fc.kernel[...] = jnp.ones_like(network.fc.kernel[...]) * jnp.arange(4.0)
  graph, params, rest = nnx.split(network, nnx.Param, ...)
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
  loss = lambda params: jnp.sum(nnx.merge(graph, params, rest, copy=True)(images, train=True) ** 2)
  grads = jax.jit(jax.grad(loss))(params)
  assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads)) and np.abs(grads["stem"]["kernel"][...]).max() > 0


@pytest.mark.parametrize("norm", ("bach", "group:0", "group:x", "group:", "batch:3", "lp", "lp:3", "ghost", ""))
def test_unknown_names_are_answered_with_all(norm):
  with pytest.raises(norms.UnknownNormError, match=r"expected one of batch, noisy_batch, group\[:GROUPS\]"):
    models.variant("resnet50", norm=norm)


def test_noise_behind_batch_normalization_is_drawn_in_training_alone():
  network = models.create("resnet_tiny", 4, norm="noisy_batch", depth=(1,), width=(32,), stage_strides=(1,))
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
  run = jax.jit(lambda key: nnx.clone(network).outputs(images, train=True, rngs=key)["pool"])
  first, again, other = (np.asarray(run(jax.random.key(seed))) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 0.01
  by_image = nnx.clone(network).outputs(images, train=True, rngs=jax.random.split(jax.random.key(0), 4))["pool"]
  assert by_image.shape == first.shape and np.isfinite(by_image).all()
  np.testing.assert_array_equal(network(images), network(images))
  with pytest.raises(ValueError, match="noise, but rngs is None"):
    network(images, train=True)
  noised = norms.noise(jnp.zeros((64, 4, 4, 6)), jax.random.key(0))
  assert np.abs(noised.mean(axis=0)).max() > 0.3 and noised.std(axis=0).max() < 0.2  # its mean moves places, not images


def test_the_normalizer_before_the_classifier_has_noise_too():
  """Without blocks' noise, which is behind their own normalizers, the answer would not change with the key."""
  network = models.create("resnet_tiny", 4, norm="noisy_batch", depth=(1,), width=(32,), stage_strides=(1,))
  network.blocks[0].draws = False
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
  pooled = [np.asarray(nnx.clone(network).outputs(images, train=True, rngs=jax.random.key(seed))["pool"]) for seed in (0, 1)]
  assert np.abs(pooled[0] - pooled[1]).max() > 0.01


def test_gates_do_not_go_with_a_normalizer():
  with pytest.raises(UserError, match="gate='se'"):
    models.variant("nf_seresnet50", norm="batch")


def test_numbers_must_divide():
  with pytest.raises(norms.UnknownNormError, match="divisor of the 6 channels"):
    make("group:4")
  with pytest.raises(UserError, match="divisor of the batch of 8"):
    norms.normalize(make("ghost:3"), X, True)
