"""The purpose-made networks: variances as theory has them, and every normalizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nfnets.lab import norms
from nfnets.lab.deep import Deep, DeepConfig
from nfnets.lab.linear import LinearNetwork, layer_similarities
from nfnets.lab.training import sgd
from nfnets.lab.vgg import VGG, VGGConfig
from nfnets.models import layers

IMAGES = jax.random.normal(jax.random.key(7), (8, 4, 4, 3))
POWER = lambda out, branch: jnp.mean(out**2)
NAMES = ("none", "batch", "batch_uncentred", "noisy_batch", "ghost:4", "layer", "instance", "group:2", "lp:1", "lp:2", "lp:inf")
NAMES += (
  "dyt",
  "derf",
  "weight_norm",
  "weight_std",
  "scaled_weight_std",
  "skipinit",
  "skipinit_root",
  "fixup",
  "nf",
  "nf_without_ws",
)


def powers(seeds, **fields):
  """The mean square behind each block over that of the stem, averaged over seeds: [depth]."""
  config = DeepConfig(**fields)

  @jax.jit
  @jax.vmap
  def run(key):
    network = Deep(config, key)
    stem = jnp.mean(network.stem(IMAGES) ** 2)
    return network.run(IMAGES / jnp.sqrt(stem), probe=POWER)[1]

  return np.asarray(run(jax.random.split(jax.random.key(0), seeds))).mean(axis=0)


def test_unnormalized_variance_doubles_each_block_in_expectation():
  """Linear blocks: E‖x + W x‖² = 2 ‖x‖² exactly (De and Smith 2020)."""
  grown = powers(300, depth=4, width=32, norm="none", activation="identity")
  np.testing.assert_allclose(grown, 2.0 ** np.arange(1, 5), rtol=0.1)


def test_normalized_variance_grows_by_one_each_block():
  """Linear blocks after BatchNorm: a branch has the variance 1 whatever the skip path's is, so that block l ends at l + 1."""
  grown = powers(200, depth=4, width=16, norm="batch", activation="identity")
  np.testing.assert_allclose(grown, np.arange(2, 6), rtol=0.03)


def test_alpha_beta_grows_by_alpha_squared_and_starts_again():
  """Linear blocks divided by their expected deviation (Brock et al. 2021a): 1 + alpha² l, and 1 + alpha² after a transition."""
  config = {"depth": 4, "width": 32, "norm": "nf_without_ws", "activation": "identity", "stages": 2, "alpha": 0.5}
  np.testing.assert_allclose(powers(300, **config), [1.25, 1.5] * 2, rtol=0.06)
  stds = DeepConfig(depth=6, width=1, stages=2, alpha=0.5).expected_stds()
  np.testing.assert_allclose(np.square(stds), [1, 1.25, 1.5, 1.75, 1.25, 1.5])


@pytest.mark.parametrize(
  ("norm", "expected", "tolerance"),
  [
    ("none", [2, 4, 8], 1e-5),
    ("batch", [2, 3, 4], 2e-4),
    ("nf_without_ws", [1.25, 1.5, 1.75], 1e-5),
    ("skipinit_root", [4 / 3, 16 / 9, 64 / 27], 1e-5),
  ],
)
def test_variance_recursions_exactly(norm, expected, tolerance):
  """Kernels that are a rotation Q of the channels: ‖x + Q x‖² + ‖x - Q x‖² = 4 ‖x‖², so that the mean over all signs is exact."""
  config, rng = DeepConfig(depth=3, width=8, norm=norm, activation="identity", alpha=0.5), np.random.default_rng(0)
  network = Deep(config, jax.random.key(0))
  graph, state = nnx.split(network)
  pixels = jax.random.normal(jax.random.key(1), (8, 4, 4, 3))
  stem = network.stem(pixels)
  rotations = np.stack([np.linalg.qr(rng.normal(size=(8, 8)))[0] for _ in range(3)])

  def power(signs):
    kernels = jnp.zeros((3, 3, 3, 8, 8)).at[:, 1, 1].set(signs[:, None, None] * rotations)
    params = nnx.to_pure_dict(state)
    params["blocks"][0]["convs"][0]["kernel"] = kernels
    changed = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(changed, params)
    return nnx.merge(graph, changed).run(pixels / jnp.sqrt(jnp.mean(stem**2)), probe=POWER)[1]

  signs = jnp.array([[a, b, c] for a in (1.0, -1.0) for b in (1.0, -1.0) for c in (1.0, -1.0)])
  np.testing.assert_allclose(np.mean([power(sign) for sign in signs], axis=0), expected, rtol=tolerance)


def test_rescaling_follows_what_float32_cannot_hold():
  config = DeepConfig(depth=200, width=4, norm="none")
  scale, power = jax.jit(lambda key: Deep(config, key).run(IMAGES, probe=POWER, rescale=True)[1])(jax.random.key(0))
  logs = np.log2(np.asarray(power)) + 2 * np.asarray(scale)
  assert np.isfinite(logs).all() and logs[-1] > 128  # 2^128 is the end of float32
  plain = jax.jit(lambda key: Deep(config, key).run(IMAGES, probe=POWER)[1])(jax.random.key(0))
  np.testing.assert_allclose(logs[:40], np.log2(np.asarray(plain)[:40]), rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_every_normalizer_learns(name):
  """Gradients are finite and not all zero, in a residual network; a plain one runs."""
  row, _ = norms.lookup(name)
  config = DeepConfig(depth=2, width=8, norm=name, convs=2 if name == "fixup" else 1)
  key = jax.random.key(1)
  graph, params, rest = nnx.split(Deep(config, key), nnx.Param, ...)
  loss = lambda params: jnp.mean((nnx.merge(graph, params, rest, copy=True)(IMAGES, key=key) - 1) ** 2)
  grads = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
  assert all(bool(jnp.isfinite(grad).all()) for grad in grads) and max(float(jnp.abs(grad).max()) for grad in grads) > 0


def test_kernels_are_those_drawn_in_their_shape():
  """They are drawn flat, which compiles sooner; that the numbers are the same keeps what was measured before."""
  keys = jax.random.split(jax.random.key(2), 3)
  make = lambda key: norms.conv("none", 4, 5, 3, act="identity", keys=layers.ParamKeys(key)).kernel[...]
  draw = lambda key: jax.random.normal(layers.ParamKeys(key).params(), (3, 3, 4, 5)) / 6  # 6 is the root of the 36 inputs
  np.testing.assert_allclose(jax.jit(jax.vmap(make))(keys), jax.vmap(draw)(keys), rtol=1e-6)


@pytest.mark.parametrize("name", ("batch", "scaled_weight_std"))
def test_vgg_runs(name):
  run = jax.jit(lambda key: VGG(VGGConfig(width=(4, 8), convs=1, norm=name), key)(IMAGES))
  assert run(jax.random.key(0)).shape == (8, 10)


def test_normalizers_do_what_their_names_say():
  x = 3 * jax.random.normal(jax.random.key(0), (8, 4, 4, 4)) + jnp.arange(4.0)
  keys = norms.layers.ParamKeys(jax.random.key(1))
  out = {
    name: np.asarray(norms.normalize(norms.make(name, 4, keys), x, jax.random.key(2)))
    for name in NAMES[1:11]
    if name != "group:2"
  }
  np.testing.assert_allclose(out["batch"], out["lp:2"], atol=1e-4)
  np.testing.assert_allclose(out["batch"].mean(axis=(0, 1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose((out["batch_uncentred"] ** 2).mean(axis=(0, 1, 2)), 1, rtol=1e-4)
  np.testing.assert_allclose(np.abs(out["lp:1"]).mean(axis=(0, 1, 2)), 1, rtol=1e-4)
  np.testing.assert_allclose(np.abs(out["lp:inf"]).max(axis=(0, 1, 2)), 1, rtol=1e-4)
  np.testing.assert_allclose(out["instance"].std(axis=(1, 2)), 1, rtol=1e-3)
  np.testing.assert_allclose(out["layer"].std(axis=(1, 2, 3)), 1, rtol=1e-3)
  np.testing.assert_allclose(out["ghost:4"][:4].mean(axis=(0, 1, 2)), 0, atol=1e-5)
  assert np.abs(out["noisy_batch"].mean(axis=0)).mean() > 0.1  # its noise has a mean


def test_ring_convolution_equals_a_padded_one():
  kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 5))
  padded = jnp.pad(IMAGES, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
  expected = jax.lax.conv_general_dilated(padded, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  np.testing.assert_allclose(norms.convolve_ring(IMAGES, kernel), expected, atol=1e-4)


@pytest.mark.parametrize("name", ("bach", "group:0", "group:x", "batch:3", "nf:2", "lp:3", "lp", "ghost", ""))
def test_unknown_normalizers_are_answered_with_all(name):
  with pytest.raises(norms.UnknownNormError, match="expected one of (none, batch|batch, noisy_batch)"):
    norms.lookup(name)


def test_linear_networks_collapse_without_normalization_and_not_with_it():
  """Rank bounds: one direction is left without normalization; with it some constant times sqrt(width) stay."""
  inputs, key = jax.random.normal(jax.random.key(0), (16, 16)), jax.random.key(1)
  run = jax.jit(layer_similarities, static_argnums=(0, 2))
  assert float(run("none", inputs, 150, key)["effective_rank"][-1]) < 1.3
  assert float(run("batch_uncentred", inputs, 150, key)["effective_rank"][50:].mean()) > 2


@pytest.mark.parametrize("name", ("weight_norm", "weight_std", "scaled_weight_std"))
def test_linear_networks_take_normalizers_of_weights(name):
  """They make the layers' matrices, whose columns are standardized by hand here, and do not stop the collapse of the features."""
  network = LinearNetwork(12, 8, 2, name, jax.random.key(0))
  standardize = lambda w: (w - w.mean(axis=0)) / w.std(axis=0)
  factors = {
    "weight_norm": lambda w: w / jnp.linalg.norm(w, axis=0),
    "weight_std": standardize,
    "scaled_weight_std": lambda w: standardize(w) * len(w) ** -0.5,
  }
  hidden = inputs = jax.random.normal(jax.random.key(1), (5, 12))
  for layer in network.layers:
    hidden = hidden @ factors[name](layer.kernel[0, 0])
  np.testing.assert_allclose(network(inputs), network.fc(hidden), rtol=1e-4, atol=1e-4)
  run = jax.jit(layer_similarities, static_argnums=(0, 2))
  ranks = run(name, inputs, 150, jax.random.key(2))["effective_rank"]
  assert ranks[0] > 2 and ranks[-1] < 1.3


def test_fixups_biases_and_scales_take_a_tenth_of_the_learning_rate():
  """The first step of Nesterov's momentum on gradients of 1, with the rate 1, is -(1 + momentum)."""
  network = Deep(DeepConfig(depth=2, width=8, norm="fixup", convs=2), jax.random.key(0))
  params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
  optimizer = sgd(lambda count: 1.0, jnp.inf, params)
  updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
  scalars = [updates["fixup_bias"], updates["blocks"][0]["gain"], *updates["blocks"][0]["biases"].values(), updates["fc"]["bias"]]
  others = [updates["fc"]["kernel"], updates["stem"]["kernel"]]
  assert len(scalars) == 7
  for leaves, size in ((scalars, 0.19), (others, 1.9)):
    assert all(np.allclose(leaf, -size) for leaf in leaves)
  assert not np.asarray(network.fc.kernel[...]).any()
