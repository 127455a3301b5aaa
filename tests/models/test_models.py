"""Networks and layers against the papers' tables and theory: counts, arithmetic, signal at initialisation, randomness."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nfnets import models
from nfnets.models import activations, layers, resnet

# Parameters with 1000 classes: exact where the release's or timm's count is published, else in millions with two decimals.
PARAMETERS = {
  "nfnet_f0": 71_489_284,
  "nfnet_f1": 132_634_256,
  "nfnet_f2": 193.78,
  "nfnet_f3": 254_924_200,
  "nfnet_f4": 316.07,
  "nfnet_f5": 377_214_144,
  "nfnet_f6": 438.36,
  "nfnet_f7": 499.50,
  "nfnet_f0+": 118_824_516,
  "nfnet_f1+": 220_357_008,
  "nfnet_f4+": 524.95,
  "nf_regnet_b0": 8_595_372,
  "nf_regnet_b1": 10_019_208,
  "nf_regnet_b2": 13.79,
  "nf_regnet_b3": 18.14,
  "nf_regnet_b4": 29_315_830,
  "nf_regnet_b5": 48.71,
  "nf_regnet_b6": 70.05,
  "nf_regnet_b7": 101.74,
  "nf_regnet_b8": 142.31,
  "nf_resnet50": 25_557_048,
  "nf_resnet101": 44.55,
  "nf_resnet152": 60.19,
  "nf_resnet200": 64.67,
  "nf_resnet288": 146.46,
  "nf_resnet600": 300.65,
  "skipinit_resnet50": 25_530_424,
  "fixup_resnet50": 25_504_026,
  "resnet50": 25_549_352,
  "nfnet_l0": 35_074_488,
  "eca_nfnet_l0": 24_143_924,
  "eca_nfnet_l1": 41_407_728,
  "eca_nfnet_l2": 56_722_348,
  "eca_nfnet_l3": 72_036_968,
}
# Billions of multiply-adds at the test resolution (P2, table 8 and appendix); F0…F7 and F4+.
MULTIPLY_ADDS = {
  "nfnet_f0": 12.38,
  "nfnet_f1": 35.54,
  "nfnet_f2": 62.59,
  "nfnet_f3": 114.76,
  "nfnet_f4": 215.24,
  "nfnet_f5": 289.76,
  "nfnet_f6": 377.28,
  "nfnet_f7": 478.78,
  "nfnet_f4+": 333.4,
}
WITHOUT_DROPS = {"drop_rate": 0.0, "stochastic_depth": 0.0}
SMALL = {"depth": (1, 2), "width": (16, 32), "stage_strides": (1, 2)}  # every kind of block, of which a tiny network has more


def count(network: nnx.Module) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))


def images(batch: int = 2, size: int = 32) -> jax.Array:
  return jax.random.normal(jax.random.key(7), (batch, size, size, 3))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
  parameters, published = count(nnx.eval_shape(lambda: models.create(name))), PARAMETERS[name]
  assert parameters == published if isinstance(published, int) else round(parameters / 1e6, 2) == published


def test_the_papers_rounding_of_groups_is_an_option():
  assert round(count(nnx.eval_shape(lambda: models.create("nfnet_f4+", group_rounding="nearest"))) / 1e6, 1) == 526.9


@pytest.mark.parametrize("name", ["nfnet_f0", "nfnet_f2", "nfnet_f5", "nfnet_f4+"])
def test_multiply_adds_are_the_papers(name):
  size = models.variant(name).test_resolution
  description = models.describe(name, resolutions=None if name == "nfnet_f0" else {"test": size})
  assert description.resolutions["test"] == size
  assert description.macs[size] / 1e9 == pytest.approx(MULTIPLY_ADDS[name], abs=0.05 if "+" in name else 0.005)
  assert description.parameters == count(nnx.eval_shape(lambda: models.create(name)))
  assert f"{2 * description.macs[size] / 1e9:.2f} GFLOP" in str(description)


def test_a_descriptions_rows_add_up_to_what_a_small_network_does():
  """The multiply-adds of a stem, one block with a shortcut and a classifier, computed by hand."""
  description = models.describe("nf_resnet_tiny", 10, depth=(1,), width=(16,), stage_strides=(2,))
  stem = 16 * 16 * 9 * 3 * 4
  block = 16 * 16 * 4 * 4 + 8 * 8 * 9 * 4 * 4 + 8 * 8 * 4 * 16 + 8 * 8 * 4 * 16
  assert description.macs[32] == stem + block + 16 * 10
  assert [stage.shapes[32] for stage in description.stages] == [(16, 16, 4), (8, 8, 16), (16,), (10,)]


def test_every_name_creates_and_describes_itself():
  for name in set(models.names()) - set(PARAMETERS):
    if sum(models.variant(name).depth) > 70:
      continue  # too slow, and deeper rows differ from the others in depth alone
    network = nnx.eval_shape(lambda name=name: models.create(name, 10))
    assert count(network) > 0
    config = models.variant(name)
    assert config.train_resolution <= config.test_resolution
    assert sum(config.depth) == len(network.blocks)


@pytest.mark.parametrize("name", [name for name in models.names() if name.endswith("tiny")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small_networks_run_and_keep_float32_where_it_matters(name, dtype):
  network = models.create(name, 10, dtype=dtype, **SMALL)
  dtypes = {}

  @nnx.jit
  def run(network, x, key):
    return network.outputs(x, train=True, rngs=key, tap=lambda layer, value: dtypes.setdefault(layer, value.dtype))

  outputs = run(network, images(), jax.random.key(0))
  assert outputs["features"].dtype == dtype
  assert {layer for layer, layer_dtype in dtypes.items() if layer_dtype != dtype} <= {"pool", "logits"}
  chex.assert_shape(outputs["logits"], (2, 10))
  assert outputs["logits"].dtype == outputs["pool"].dtype == jnp.float32
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(network)))


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "instance", "none"])
def test_every_baseline_normalizes_as_its_name_says(norm):
  network = models.create("resnet_tiny", 10, norm=norm)
  norm0 = network.blocks[1].norm0
  if norm == "none":
    assert norm0 is None and network.blocks[1].conv0.bias is not None
    return
  x = 3 * jax.random.normal(jax.random.key(0), (4, 8, 8, 64)) * jnp.arange(1, 65) + 5
  y = np.asarray(resnet.normalize(norm0, x, True), np.float64)
  axes = {"batch": (0, 1, 2), "group": (1, 2, 4), "layer": (1, 2, 3), "instance": (1, 2)}[norm]
  y = y.reshape(4, 8, 8, 32, 2) if norm == "group" else y
  np.testing.assert_allclose(y.mean(axes), 0, atol=2e-5)
  np.testing.assert_allclose(y.std(axes), 1, atol=1e-3)


# ---- theory
@pytest.mark.parametrize("name", ["nfnet_f0", "nf_resnet50", "nf_regnet_b0"])
def test_signal_at_initialisation_follows_theory(name):
  """With skip gains of 1, a block adds alpha² times its branch's variance, and a transition starts again (P1, section 4.2)."""
  network = models.create(name, 10, **WITHOUT_DROPS)
  for block in network.blocks:
    block.skip_gain[...] = jnp.ones(())
  x = jax.image.resize(jax.random.normal(jax.random.key(0), (8, 6, 6, 3)), (8, 96, 96, 3), "bilinear")
  graph, state = nnx.split(network)

  @jax.jit
  def run(state, x):
    network, shortcut = nnx.merge(graph, state), {}
    network.outputs(
      x,
      tap=lambda name, value: (
        shortcut.update({name: jnp.mean(jnp.var(value, axis=(0, 1, 2)))}) if name.endswith("conv_shortcut") else None
      ),
    )
    return models.signal_statistics(network, x), shortcut

  statistics, shortcut = jax.device_get(run(state, (x - x.mean()) / x.std()))
  var = lambda i: float(statistics[f"blocks/{i}"]["var"])
  branch = lambda i: float(statistics[f"blocks/{i}"]["residual_var"])
  alpha, expected_var = network.blocks[0].alpha, 1.0
  measured_growth, predicted_growth = [], []  # of the variance, within stages
  for i, block in enumerate(network.blocks):
    assert 1 / block.beta**2 == pytest.approx(expected_var, rel=1e-5)
    if block.conv_shortcut is not None:
      assert var(i) == pytest.approx(shortcut[f"blocks/{i}/conv_shortcut"] + alpha**2 * branch(i), rel=0.1)
      assert i == 0 or var(i) < var(i - 1)
      expected_var = 1.0
    else:
      measured_growth.append(var(i) - var(i - 1))
      predicted_growth.append(alpha**2 * branch(i))
    expected_var += alpha**2
  assert sum(measured_growth) == pytest.approx(sum(predicted_growth), rel=0.2)
  if name == "nf_resnet50":  # it pools nothing between blocks, so that absolute values follow theory too
    assert all(0.6 < branch(i) < 1.5 for i in range(16))
    assert np.mean(measured_growth) == pytest.approx(alpha**2, rel=0.2)


@pytest.mark.parametrize("name", sorted(activations.ACTIVATIONS))
def test_gamma_is_derived(name):
  """gamma is 1/std(f(z)) for z ~ N(0, 1), here integrated numerically in float64; the release's values are sampled."""
  activation = activations.ACTIVATIONS[name]
  z = np.linspace(-12, 12, 480_001)
  weight = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * (z[1] - z[0])
  value = np.asarray(activation.fn(jnp.asarray(z, jnp.float32)), np.float64)
  mean = (value * weight).sum()
  std = np.sqrt(((value - mean) ** 2 * weight).sum())
  assert activation.gamma == pytest.approx(1 / std, rel=5e-3)
  assert float(activation(jnp.float32(0.7))) == pytest.approx(float(activation.fn(jnp.float32(0.7))) * activation.gamma)


# ---- layers
def test_scaled_weight_standardization_against_float64():
  conv = layers.WSConv(6, 8, 3, groups=2, rngs=layers.ParamKeys(jax.random.key(0)))
  kernel = 0.3 + np.random.default_rng(0).normal(size=(3, 3, 3, 8))
  kernel[..., 3] = 0.25  # the variance of a constant channel is 0; the floor makes its kernel zero, not NaN
  gain = np.linspace(0.5, 2, 8)
  conv.kernel[...], conv.gain[...] = jnp.asarray(kernel, jnp.float32), jnp.asarray(gain, jnp.float32)
  expected = (kernel - kernel.mean((0, 1, 2))) / np.sqrt(np.maximum(kernel.var((0, 1, 2)) * 27, 1e-4)) * gain
  np.testing.assert_allclose(conv.weight(), expected, rtol=1e-5, atol=1e-5)
  conv.kernel[...] = conv.kernel[...].astype(jnp.bfloat16)
  assert conv.weight().dtype == jnp.float32


def test_moments_derivatives_are_jaxs_own_with_a_sum_less():
  """Gradients, forward mode and Hessian-vector products both ways round, in float64, as of the formula that JAX derives."""
  own = lambda kernel: (jnp.mean(kernel, (0, 1, 2)), jnp.var(kernel, (0, 1, 2)))
  loss = lambda moments, kernel: jnp.sum(jnp.sin(kernel * jax.lax.rsqrt(moments(kernel)[1]) - moments(kernel)[0]))
  with jax.enable_x64(True):
    kernel, direction = np.random.default_rng(0).normal(1, 1, (2, 3, 3, 4, 5))
    gradient = lambda moments: jax.grad(functools.partial(loss, moments))
    forward = lambda moments: jax.jvp(functools.partial(loss, moments), (kernel,), (direction,))
    curved = lambda moments: jax.jvp(gradient(moments), (kernel,), (direction,))[1]
    backwards = jax.grad(lambda kernel: jnp.vdot(gradient(layers.moments)(kernel), direction))
    np.testing.assert_allclose(gradient(layers.moments)(kernel), gradient(own)(kernel), rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(forward(layers.moments), forward(own), rtol=1e-10)
    np.testing.assert_allclose(curved(layers.moments), curved(own), rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(backwards(kernel), curved(own), rtol=1e-10, atol=1e-13)
    sums = lambda moments: str(jax.make_jaxpr(gradient(moments))(kernel)).count("reduce_sum")
    assert sums(layers.moments) < sums(own)


@pytest.mark.parametrize("name, ours, derived", [("gelu", "exponential", "tanh"), ("silu", "tanh", "exponential")])
def test_slopes_of_activations_share_nothing_with_them_on_gpus_alone(name, ours, derived):
  fn, slope = activations.ACTIVATIONS[name].fn, getattr(activations, f"_{name}_slope")
  x = np.linspace(-12, 12, 2001)
  with jax.enable_x64(True):
    exact = jax.vmap(jax.grad(functools.partial(jax.nn.gelu, approximate=True) if name == "gelu" else jax.nn.silu))(x)
    np.testing.assert_allclose(slope(x), exact, rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(slope(np.float32(x)), exact, rtol=1e-5, atol=4e-6)
  np.testing.assert_allclose(jax.vmap(jax.grad(fn))(np.float32(x)), exact, rtol=1e-5, atol=1e-5)
  step = jax.jit(jax.grad(lambda x: jnp.sum(fn(x)))).trace(jnp.ones(4, jnp.bfloat16))
  for platform in ("cpu", "cuda", "tpu"):
    text = step.lower(lowering_platforms=(platform,)).as_text()
    assert (f"stablehlo.{ours}" in text) == (platform == "cuda") and (f"stablehlo.{derived}" in text) == (platform != "cuda")


def test_gelu_by_erf_has_its_values_and_derivatives_and_no_erfc_on_cpus():
  fn, x = activations.ACTIVATIONS["gelu_erf"].fn, np.linspace(-12, 12, 2001)
  second = lambda fn: jax.grad(jax.grad(fn))
  with jax.enable_x64(True):
    exact = functools.partial(jax.nn.gelu, approximate=False)
    for ours, theirs in ((fn, exact), (jax.grad(fn), jax.grad(exact)), (second(fn), second(exact))):
      np.testing.assert_allclose(jax.vmap(ours)(x), jax.vmap(theirs)(x), rtol=1e-12, atol=1e-14)
    values, slopes = exact(x), jax.vmap(jax.grad(exact))(x)
  np.testing.assert_allclose(fn(np.float32(x)), values, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(jax.vmap(jax.grad(fn))(np.float32(x)), slopes, rtol=1e-6, atol=1e-6)
  half = jnp.asarray(x, jnp.bfloat16)
  np.testing.assert_allclose(np.float64(fn(half)), np.float64(exact(np.float64(half))), rtol=2**-8, atol=1e-6)
  for numbers in (1.0, np.arange(3)):
    np.testing.assert_allclose(fn(numbers), jax.nn.gelu(numbers, approximate=False), rtol=1e-6)
  program = jax.jit(jax.grad(lambda x: jnp.sum(fn(x)))).trace(jnp.ones(4, jnp.bfloat16))
  texts = {platform: program.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda", "tpu")}
  assert {platform for platform, text in texts.items() if "erfc" in text} == {"cuda", "tpu"}


@pytest.mark.parametrize("height, width", [(4, 6), (5, 6), (4, 3), (1, 1)])
def test_average_pooling_counts_real_pixels_alone(height, width):
  x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
  expected = [[x[:, i : i + 2, j : j + 2].mean((1, 2)) for j in range(0, width, 2)] for i in range(0, height, 2)]
  np.testing.assert_allclose(layers.average_pool(x), np.moveaxis(np.array(expected), 2, 0), atol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_join_is_a_scaled_branch_beside_a_shortcut(gated):
  draw = np.random.default_rng(0)
  shortcut, branch = (draw.normal(size=(8, 3, 3, 4)) for _ in range(2))
  gate = draw.uniform(size=(8, 1, 1, 4)) if gated else None
  keep = jax.random.bernoulli(jax.random.key(3), 0.5, (8, 1, 1, 1))
  gain = nnx.Param(jnp.float32(0.7))
  given = [jnp.float32(x) if x is not None else None for x in (shortcut, branch, gate)]
  got = layers.join(given[0], given[1], alpha=0.2, gain=gain, gate=given[2], drop_rate=0.5, key=jax.random.key(3))
  expected = shortcut + np.where(keep, 0.2 * 0.7 * (1 if gate is None else gate) * branch, 0)
  assert 0 < keep.sum() < 8
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
  assert layers.join(*(x.astype(jnp.bfloat16) for x in given[:2]), gain=gain).dtype == jnp.bfloat16


def test_stochastic_depth_drops_samples_and_does_not_rescale():
  x = jnp.ones((2000, 1, 1, 4))
  kept = np.asarray(layers.join(jnp.zeros_like(x), x, drop_rate=0.25, key=jax.random.key(0)))[:, 0, 0]
  assert set(np.unique(kept)) == {0.0, 1.0} and (kept == kept[:, :1]).all()
  assert kept[:, 0].mean() == pytest.approx(0.75, abs=0.04)


def test_randomness_needs_rngs_and_is_off_at_evaluation():
  network = models.create("nf_resnet_tiny", 10, drop_rate=0.2, stochastic_depth=0.5, **SMALL)
  network.fc.bias[...] = jnp.zeros(10)
  for block in network.blocks:
    block.skip_gain[...] = jnp.ones(())
  with pytest.raises(ValueError, match="rngs"):
    network(images(), train=True)
  run = nnx.jit(lambda network, train, key: network(images(), train=train, rngs=key), static_argnums=1)
  seed0, seed1 = (run(network, True, jax.random.key(seed)) for seed in (0, 1))
  assert not np.array_equal(seed0, seed1)
  np.testing.assert_array_equal(run(network, True, jax.random.key(0)), seed0)
  np.testing.assert_array_equal(run(network, False, None), run(network, False, jax.random.key(5)))
  deterministic = models.create("nf_resnet_tiny", 10, **WITHOUT_DROPS, **SMALL)
  np.testing.assert_array_equal(run(deterministic, True, None), run(deterministic, False, None))


@pytest.mark.parametrize("name", ["nfnet_tiny", "nf_resnet_tiny", "resnet_tiny", "fixup_resnet_tiny"])
def test_remat_changes_no_gradient_and_no_statistic(name):
  def run(remat):
    graph, params, stats = nnx.split(
      models.create(name, 10, remat=remat, depth=(1, 1), width=(16, 32), stage_strides=(1, 2)), nnx.Param, nnx.BatchStat
    )

    def loss(params):
      network = nnx.merge(graph, params, stats, copy=True)
      return jnp.sum(network(images(), train=True, rngs=jax.random.key(3)) ** 2), nnx.state(network, nnx.BatchStat)

    return jax.jit(jax.grad(loss, has_aux=True))(params), str(jax.make_jaxpr(jax.grad(loss, has_aux=True))(params))

  (kept, program), (recomputed, remat_program) = run(False), run(True)
  assert "remat" in remat_program and "remat" not in program
  chex.assert_trees_all_close(kept, recomputed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, remat", [("nfnet_tiny", True), ("nf_resnet_tiny", False), ("resnet_tiny", False)])
def test_a_loop_over_equal_blocks_changes_no_value_no_gradient_and_no_name(name, remat):
  """With skip gains that are not zero, stochastic depth, a key for each image; BatchNorm's statistics keep a network unrolled."""
  keys = jax.random.split(jax.random.key(3), len(images()))

  def run(scan):
    row = {"depth": (3, 2), "width": (16, 32), "stage_strides": (1, 2), "stochastic_depth": 0.3, "remat": remat, "scan": scan}
    graph, params, stats = nnx.split(models.create(name, 10, **row), nnx.Param, nnx.BatchStat)
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.asarray(leaf) + np.asarray(0.2 * draw.normal(size=leaf.shape), leaf.dtype), params)

    def loss(params):
      network = nnx.merge(graph, params, stats, copy=True)
      return jnp.sum(network(images(), train=True, rngs=keys) ** 2)

    grad = jax.value_and_grad(loss)
    return jax.jit(grad)(params), str(jax.make_jaxpr(grad)(params)), jax.tree.structure(params)

  (unrolled, program, names), (looped, scan_program, scan_names) = run(False), run(True)
  assert " scan[" not in program and (" scan[" in scan_program) == (name != "resnet_tiny") and names == scan_names
  scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(unrolled[1]))
  chex.assert_trees_all_close(unrolled, looped, rtol=1e-5, atol=1e-5 * scale)


def test_taps_see_every_layer_in_order_and_cost_nothing_when_off():
  network = models.create("nfnet_tiny", 10)
  taps = []
  jax.eval_shape(lambda x: network.outputs(x, tap=lambda name, x: taps.append(name)), images())
  assert taps[0] == "stem/conv0" and taps[-2:] == ["pool", "logits"]
  assert taps.index("blocks/0/conv1b") < taps.index("blocks/0/residual") < taps.index("blocks/0") < taps.index("blocks/1/conv0")
  graph, state = nnx.split(network)
  plain = str(jax.make_jaxpr(lambda s, x: nnx.merge(graph, s)(x))(state, images()))
  tapped = lambda s, x: nnx.merge(graph, s).outputs(x, tap=lambda name, x: None)["logits"]
  assert plain == str(jax.make_jaxpr(tapped)(state, images()))
  statistics = {}
  jax.eval_shape(lambda x: statistics.update(models.signal_statistics(network, x)), images())
  assert list(statistics) == ["stem", *(f"blocks/{i}" for i in range(5))]
  assert set(statistics["blocks/2"]) == {"mean_sq", "var", "residual_var"} and set(statistics["stem"]) == {"mean_sq", "var"}


def test_initial_values_have_the_published_deviations():
  network = models.create("nfnet_f0", 1000, depth=(1, 1, 2, 1))
  assert float(jnp.std(network.fc.kernel[...])) == pytest.approx(0.01, rel=0.01)
  conv = network.blocks[3].conv0.kernel[...]
  assert float(jnp.std(conv)) == pytest.approx(conv.shape[2] ** -0.5, rel=0.01)
  dense = network.blocks[3].se.fc0.kernel[...]  # cut at two deviations, which leaves 0.8796 of the deviation
  assert float(jnp.std(dense)) == pytest.approx(0.8796 * dense.shape[0] ** -0.5, rel=0.01)
  assert float(jnp.max(jnp.abs(dense))) <= 2 * dense.shape[0] ** -0.5
  assert not jnp.any(models.create("nf_regnet_b0", 10).fc.kernel[...])


def test_eager_and_traced_creation_agree():
  make = functools.partial(models.create, "nfnet_tiny", 10, **SMALL)
  eager, traced = nnx.state(make(rngs=nnx.Rngs(5))), nnx.state(nnx.jit(lambda: make(rngs=nnx.Rngs(5)))())
  chex.assert_trees_all_close(eager, traced, rtol=1e-5, atol=1e-7)
  seed6 = nnx.state(make(rngs=nnx.Rngs(6)))
  assert not np.array_equal(eager["stem"]["conv0"]["kernel"][...], seed6["stem"]["conv0"]["kernel"][...])


# ---- mistakes
def test_names_are_forgiving_and_mistakes_are_answered():
  assert models.variant("NFNet-F0+") == models.variant("nfnet_f0+")
  with pytest.raises(models.UnknownModelError, match="nf_resnet50"):
    models.create("nf_resnet5")
  with pytest.raises(models.UnknownOverrideError, match="drop_rate"):
    models.create("nfnet_f0", droprate=0.1)
  for override, expected in [
    ({"drop_rate": 1.0}, "probability"),
    ({"activation": "swosh"}, "one of"),
    ({"depth": (1, 2)}, "one entry a stage"),
    ({"gate": "sse"}, "'se', 'eca'"),
    ({"width": (0, 1, 1, 1)}, "positive ints"),
    ({"remat": 1}, "True or False"),
    ({"dialect": "torch"}, "'official', 'timm'"),
    ({"alpha": -0.2}, "finite number > 0"),
    ({"stem_width": (8, 12)}, "3 of them"),
    ({"stem_width": 3}, "3 of them"),
    ({"expansion": float("nan")}, "finite number"),
    ({"activation": "glu"}, "one of"),
    ({"stem_features": 0}, "a positive int"),
  ]:
    with pytest.raises(models.InvalidOverrideError, match=expected):
      models.create("nfnet_f0", **override)
  for classes in (0, -1, 2.5, True):
    with pytest.raises(models.InvalidOverrideError, match="num_classes"):
      models.create("nfnet_f0", classes)
  with pytest.raises(models.InvalidOverrideError, match="dtype"):
    models.create("nfnet_f0", dtype="int8")
  for shape in ((32, 32, 3), (1, 32, 32, 1), (1, 0, 0, 3)):
    with pytest.raises(ValueError, match="batch, height, width, 3"):
      models.create("nfnet_tiny", 10)(jnp.zeros(shape))
