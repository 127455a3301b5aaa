"""AGC on the trees of NNX, Linen and Haiku, inside other transformations, and on eight devices."""

import functools
import operator

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from nfnets.agc import agc, agc_metrics, explain, explain_entries, named_leaves


def axes(tree, **kwargs):
  """{path: unit axes} of a tree whose leaves are shapes."""
  params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=lambda s: isinstance(s, tuple))
  return {entry.path: entry.unit_axes for entry in explain_entries(params, **kwargs)}


# {case: (path of the module, {leaf: shape}, unit axes of its first leaf, of its second...)}
MODULES = {
  "conv1d": ("conv", {"kernel": (3, 4, 5), "bias": (5,)}, (2,), ()),
  "conv2d": ("conv", {"kernel": (3, 3, 4, 5), "bias": (5,), "gain": (5,)}, (3,), (), ()),
  "conv3d": ("conv", {"kernel": (3, 3, 3, 4, 5), "bias": (5,)}, (4,), ()),
  "conv1d lone": ("conv", {"kernel": (3, 4, 5)}, (2,)),
  "conv2d lone": ("conv", {"kernel": (3, 3, 4, 5)}, (3,)),
  "conv3d lone": ("conv", {"kernel": (3, 3, 3, 4, 5)}, (4,)),
  "square": ("conv", {"kernel": (5, 5, 5, 5), "bias": (5,)}, (3,), ()),
  "grouped": ("conv", {"kernel": (3, 3, 2, 8), "bias": (8,)}, (3,), ()),
  "depthwise": ("conv", {"kernel": (3, 3, 1, 8)}, (3,)),
  "rgb": ("conv", {"kernel": (3, 3, 64, 3), "bias": (3,)}, (3,), ()),
  "1x1x1xN": ("conv", {"kernel": (1, 1, 1, 8), "bias": (8,)}, (3,), ()),
  "1xN": ("dense", {"kernel": (1, 8), "bias": (8,)}, (1,), ()),
  "Nx1": ("dense", {"kernel": (8, 1), "bias": (1,)}, (1,), ()),
  "linen transposed": ("ConvTranspose_0", {"kernel": (3, 3, 4, 5), "bias": (5,)}, (3,), ()),
  "linen transpose_kernel": ("ConvTranspose_0", {"kernel": (3, 3, 5, 4), "bias": (5,)}, (2,), ()),
  "haiku transposed": ("net/~/conv2_d_transpose", {"w": (3, 3, 5, 4), "b": (5,)}, (2,), ()),
  "haiku transposed square": ("conv1_d_transpose_1", {"w": (3, 4, 4), "b": (4,)}, (1,), ()),
  "haiku transposed lone": ("conv3_d_transpose", {"w": (3, 3, 3, 5, 4)}, (3,)),
  "haiku depthwise": ("depthwise_conv2_d", {"w": (3, 3, 1, 8), "b": (8,)}, (3,), ()),
  "haiku batch norm": ("bn", {"scale": (1, 1, 1, 8), "offset": (1, 1, 1, 8)}, (), ()),
  "query": ("attn/query", {"kernel": (8, 4, 3), "bias": (4, 3)}, (1, 2), ()),
  "query lone": ("attn/query", {"kernel": (8, 4, 3)}, (1, 2)),
  "query, as many heads as inputs": ("attn/query", {"kernel": (4, 4, 3), "bias": (4, 3)}, (1, 2), ()),
  "qkv": ("attn/qkv", {"kernel": (8, 3, 4, 2), "bias": (3, 4, 2)}, (1, 2, 3), ()),
  "out": ("attn/out", {"kernel": (4, 3, 8), "bias": (8,)}, (2,), ()),
  "out lone": ("attn/out", {"kernel": (4, 3, 8)}, (2,)),
  "haiku heads": ("mha/query", {"w": (8, 12), "b": (12,)}, (1,), ()),
  "dense general": ("proj", {"kernel": (8, 4, 3), "bias": (4, 3)}, (1, 2), ()),
  "embed": ("embed", {"embedding": (100, 8)}, (0,)),
  "haiku embed": ("embed", {"embeddings": (100, 8)}, (0,)),
  "tied embed": ("embed", {"embedding": (100, 8), "bias": (100,)}, (0,), ()),
  "patches": ("embedding", {"kernel": (16, 16, 3, 8), "bias": (8,)}, (3,), ()),
  "positions": ("posembed_input", {"pos_embedding": (1, 10, 8)}, (0, 1)),
  "token": ("vit", {"cls": (1, 1, 8)}, (0, 1)),
  "torch linear": ("dense", {"kernel": (7, 4), "bias": (7,)}, (0,), ()),
  "scalar": ("block", {"skip_gain": ()}, ()),
  "stacked dense": ("layers", {"kernel": (6, 4, 5), "bias": (6, 5)}, (0, 2), (0,)),
  "stacked dense, as many layers as inputs": ("layers", {"kernel": (4, 4, 4), "bias": (4, 4)}, (0, 2), (0,)),
  "stacked conv": ("layers", {"kernel": (6, 3, 3, 4, 5), "bias": (6, 5)}, (0, 4), (0,)),
  "stacked twice": ("layers", {"kernel": (6, 2, 4, 5), "bias": (6, 2, 5)}, (0, 1, 3), (0, 1)),
  "stacked transposed": ("layers", {"kernel": (6, 3, 3, 5, 4), "bias": (6, 5)}, (0, 3), (0,)),
  "stacked query": ("attn/query", {"kernel": (6, 8, 4, 3), "bias": (6, 4, 3)}, (0, 2, 3), (0,)),
  "stacked out": ("attn/out", {"kernel": (6, 4, 3, 8), "bias": (6, 8)}, (0, 3), (0,)),
  "stacked batch norm of Haiku": ("bn", {"scale": (6, 1, 1, 8), "offset": (6, 1, 1, 8)}, (0,), (0,)),
}


@pytest.mark.parametrize("case", MODULES)
def test_unit_axes_of_one_module(case):
  module, shapes, *want = MODULES[case]
  wanted = {f"net/{module}/{leaf}": unit_axes for leaf, unit_axes in zip(shapes, want, strict=True)}
  assert axes({"net": {module: shapes}}) == wanted


def test_stack_is_known_from_the_neighbours():
  """A lone stacked kernel (L, H, W, I, O) or scalar (L,) in a scanned block, beside the same block unrolled."""
  layer = {"conv": {"kernel": (3, 3, 4, 5)}, "attn": {"query": {"kernel": (5, 2, 3)}}, "norm": {"scale": (5,)}, "skip_gain": ()}
  stacked = jax.tree.map(lambda s: (6, *s), layer, is_leaf=lambda s: isinstance(s, tuple))
  got = axes({"layers": stacked, "first": layer, "head": {"kernel": (5, 10), "bias": (10,)}})
  assert {path: units for path, units in got.items() if path.startswith("layers")} == {
    "layers/conv/kernel": (0, 4),
    "layers/attn/query/kernel": (0, 2, 3),
    "layers/norm/scale": (0,),
    "layers/skip_gain": (0,),
  }
  assert {path: units for path, units in got.items() if not path.startswith("layers")} == {
    "first/conv/kernel": (3,),
    "first/attn/query/kernel": (1, 2),
    "first/norm/scale": (),
    "first/skip_gain": (),
    "head/kernel": (1,),
    "head/bias": (),
  }


def test_overrides():
  tree = {"conv": {"kernel": (6, 3, 4, 5)}, "fc": {"kernel": (4, 5), "bias": (5,)}}
  got = axes(tree, unit_axes={"conv": (0, -1), "fc/kernel": "all", "bias": [0], "kernel": (0,)})
  assert got == {"conv/kernel": (0, 3), "fc/kernel": (), "fc/bias": (0,)}
  assert axes(tree, unit_axes={"fc/kernel": ()})["fc/kernel"] == ()


@pytest.mark.parametrize("name", ["query", "dense"])
def test_stacked_linen_layers_equal_a_loop_over_them(name):
  """To clip six stacked layers is to clip each of them alone."""
  layer = {"conv": {"kernel": (3, 3, 4, 5), "bias": (5,)}, name: {"kernel": (4, 2, 3), "bias": (2, 3)}, "gate": ()}
  rng = np.random.default_rng(0)
  draw = lambda s: jnp.asarray(rng.normal(size=(6, *s)), jnp.float32)
  params, grads = (jax.tree.map(draw, layer, is_leaf=lambda s: isinstance(s, tuple)) for _ in range(2))
  tx = agc(0.5)
  stacked = tx.update(grads, tx.init(params), params)[0]
  for i in range(6):
    layer_params, layer_grads, wanted = (jax.tree.map(operator.itemgetter(i), tree) for tree in (params, grads, stacked))
    clipped = tx.update(layer_grads, tx.init(layer_params), layer_params)[0]
    chex.assert_trees_all_close(clipped, wanted, rtol=1e-6)


class Net(nnx.Module):
  def __init__(self, rngs):
    self.blocks = nnx.List([nnx.Conv(3, 4, (3, 3), rngs=rngs)])
    self.fc = nnx.Linear(4, 2, rngs=rngs)
    self.fc.kernel = nnx.Param(self.fc.kernel[...], agc=False)
    self.count = nnx.Variable(jnp.zeros((), jnp.int32))

  def __call__(self, x):
    return self.fc(self.blocks[0](x).mean((1, 2)))


def test_nnx_mark_is_honoured_through_split_jit_and_grad():
  graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
  assert [leaf.path for leaf in named_leaves(params)] == ["blocks/0/bias", "blocks/0/kernel", "fc/bias", "fc/kernel"]
  loss = lambda p: 1e3 * (nnx.merge(graphdef, p, rest)(jnp.ones((1, 5, 5, 3))) ** 2).sum()
  tx = agc(0.01, track=True)

  @jax.jit
  def step(params, state):
    grads = jax.grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return grads, updates, state

  grads, updates, state = step(params, tx.init(params))
  assert jax.tree.structure(updates) == jax.tree.structure(params)
  np.testing.assert_array_equal(grads["fc"]["kernel"][...], updates["fc"]["kernel"][...])
  kernels = [np.asarray(tree["blocks"][0]["kernel"][...]) for tree in (updates, params)]
  chex.assert_shape(kernels, (3, 3, 3, 4))  # (H, W, I, O)
  update_norm, norm = (np.sqrt((kernel**2).sum((0, 1, 2))) for kernel in kernels)
  np.testing.assert_allclose(update_norm / norm, 0.01, rtol=1e-5)
  assert agc_metrics(state).keys() == {"blocks/0/bias", "blocks/0/kernel", "fc/bias"}
  assert "excluded: marked agc=False" in explain(params)
  assert "excluded: marked agc=False" in explain(nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param, ...)[1])
  masked = optax.masked(tx, jax.tree.map(lambda w: w.ndim > 1, params))
  updates, _ = masked.update(grads, masked.init(params), params)
  np.testing.assert_array_equal(grads["fc"]["bias"][...], updates["fc"]["bias"][...])


def test_explain_of_a_module_looks_at_its_parameters_alone():
  class Normalized(nnx.Module):
    def __init__(self, rngs):
      self.norm, self.dropout = nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
      self.adapted = nnx.LoRA(3, 2, 4, rngs=rngs)  # its kind of Variable is derived from nnx.Param

  network = Normalized(nnx.Rngs(0))
  params = nnx.state(network, nnx.Param)
  assert [entry.path for entry in explain_entries(network)] == ["adapted/lora_a", "adapted/lora_b", "norm/bias", "norm/scale"]
  assert explain(network) == explain(nnx.state(network)) == explain(params)
  with pytest.raises(ValueError, match="exclude: pattern 'norm/mean' matches no parameter"):
    explain(network, exclude="norm/mean")


def test_linen_trees_with_attention_scan_and_boxes():
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      x = nn.LayerNorm(use_bias=False)(x)
      x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, use_bias=False)(x)
      return nn.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "model")))(x), None

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Embed(10, 8)(x)
      x, _ = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4,
                     metadata_params={nn.PARTITION_NAME: None})(name="layers")(x, None)  # fmt: skip
      return nn.Dense(3, name="head")(nn.ConvTranspose(6, (3,), transpose_kernel=True)(x))

  variables = jax.eval_shape(Model().init, jax.random.key(0), jnp.zeros((1, 5), jnp.int32))
  got = {entry.path.removeprefix("params/"): entry.unit_axes for entry in explain_entries(variables, exclude="head/kernel")}
  attn = "layers/MultiHeadDotProductAttention_0"
  assert got == {
    "Embed_0/embedding": (0,),
    "layers/LayerNorm_0/scale": (0,),
    f"{attn}/query/kernel": (0, 2, 3),
    f"{attn}/key/kernel": (0, 2, 3),
    f"{attn}/value/kernel": (0, 2, 3),
    f"{attn}/out/kernel": (0, 3),
    "layers/Dense_0/kernel": (0, 2),
    "layers/Dense_0/bias": (0,),
    "ConvTranspose_0/kernel": (1,),
    "ConvTranspose_0/bias": (),
    "head/kernel": (),
    "head/bias": (),
  }


HAIKU = {
  "net/~/conv": {"w": jnp.ones((3, 3, 2, 4)), "b": jnp.ones(4), "gain": jnp.ones(4)},
  "net/~/fc": {"w": jnp.ones((4, 3)), "b": jnp.ones(3)},
}
HEAD = r"(head|classifier|fc)/(kernel|w)$"


def ones(tree, value=1.0):
  return jax.tree.map(lambda x: jnp.full_like(x, value), tree)


def test_haiku_tree():
  tx = agc(0.01, exclude=HEAD)
  out, _ = tx.update(ones(HAIKU), tx.init(HAIKU), HAIKU)
  np.testing.assert_array_equal(out["net/~/fc"]["w"], 1.0)
  for path in ("net/~/conv", "w"), ("net/~/conv", "b"), ("net/~/fc", "b"):
    np.testing.assert_allclose(out[path[0]][path[1]], 0.01, rtol=1e-6)


def labels(params):
  return jax.tree_util.tree_map_with_path(lambda path, _: "w" if path[-1].key == "w" else "rest", params)


WRAPPED = {
  "chain": lambda: optax.chain(agc(0.01, exclude=HEAD, track=True), optax.sgd(1.0)),
  "masked": lambda: optax.chain(
    optax.masked(agc(0.01, exclude=HEAD, track=True), jax.tree.map(lambda x: True, HAIKU)), optax.sgd(1.0)
  ),
  "multi_transform": lambda: optax.chain(
    # HEAD matches nothing that the transformation of "rest" sees but masked leaves, and that is no mistake.
    optax.multi_transform({key: agc(0.01, exclude=HEAD, track=True) for key in ("w", "rest")}, labels),
    optax.sgd(1.0),
  ),
  "MultiSteps": lambda: optax.MultiSteps(
    optax.chain(agc(0.01, exclude=HEAD, track=True), optax.sgd(1.0)), 2
  ).gradient_transformation(),
  "inject_hyperparams": lambda: optax.chain(optax.inject_hyperparams(agc)(0.01, exclude=HEAD, track=True), optax.sgd(1.0)),
  "inject a schedule": lambda: optax.chain(
    optax.inject_hyperparams(agc)(lambda step: 0.01, exclude=HEAD, track=True), optax.sgd(1.0)
  ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_inside_other_transformations(name):
  tx = WRAPPED[name]()
  state, total = jax.jit(tx.init)(HAIKU), ones(HAIKU, 0.0)
  for _ in range(2 if name == "MultiSteps" else 1):
    updates, state = jax.jit(tx.update)(ones(HAIKU), state, HAIKU)
    total = jax.tree.map(jnp.add, total, updates)
  np.testing.assert_array_equal(total["net/~/fc"]["w"], -1.0)
  np.testing.assert_allclose(total["net/~/conv"]["w"], -0.01, rtol=1e-6)
  np.testing.assert_allclose(total["net/~/fc"]["b"], -0.01, rtol=1e-6)
  metrics = agc_metrics(state)
  assert metrics.keys() == {"net/~/conv/w", "net/~/conv/b", "net/~/conv/gain", "net/~/fc/b"}
  np.testing.assert_allclose([row["max_ratio"] for row in metrics.values()], 1.0, rtol=1e-6)
  restored = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
  chex.assert_trees_all_equal(restored, state)


def test_injected_clipping_can_be_changed():
  tx = optax.inject_hyperparams(agc)(0.01, exclude=HEAD)
  state = tx.init(HAIKU)
  state.hyperparams["clipping"] = jnp.float32(0.1)
  out, _ = jax.jit(tx.update)(ones(HAIKU), state, HAIKU)
  np.testing.assert_allclose(out["net/~/conv"]["b"], 0.1, rtol=1e-6)


@functools.cache
def reference_case():
  """Gradients of eight replicas on one set of parameters, and what agc makes of their mean on one device without jit."""
  rng = np.random.default_rng(0)
  shapes = {"conv": {"kernel": (3, 3, 8, 16), "gain": (16,), "bias": (16,)}, "fc": {"kernel": (16, 8), "bias": (8,)}}
  is_shape = lambda s: isinstance(s, tuple)
  params = jax.tree.map(lambda s: np.float32(rng.normal(size=s)), shapes, is_leaf=is_shape)
  spread = lambda s: 10.0 ** rng.uniform(-3, 1, s[-1:])
  grads = jax.tree.map(lambda s: np.float32(rng.normal(size=(8, *s)) * spread(s)), shapes, is_leaf=is_shape)
  mean = jax.tree.map(lambda g: g.mean(0), grads)
  tx = agc(0.01, exclude="fc/kernel", track=True)
  out, state = tx.update(mean, tx.init(params), params)
  return tx, params, grads, mean, out, agc_metrics(state)


def assert_same(out, metrics, i=None):
  *_, want, want_metrics = reference_case()
  got = (out, metrics) if i is None else jax.tree.map(lambda x: x[i], (out, metrics))
  chex.assert_trees_all_close(got, (want, want_metrics), rtol=2e-6)


def test_jit_and_vmap():
  tx, params, _, mean, *_ = reference_case()

  def step(grad, weight):
    out, state = tx.update(grad, tx.init(weight), weight)
    return out, agc_metrics(state)

  assert_same(*jax.jit(step)(mean, params))
  stacked = jax.tree.map(lambda x: jnp.stack([x, 7 * x, x]), (mean, params))
  out, metrics = jax.jit(jax.vmap(step))(*stacked)
  assert_same(out, metrics, 0)
  assert_same(out, metrics, 2)


EIGHT = pytest.mark.skipif(jax.device_count() < 8, reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8")


@EIGHT
def test_pmap_and_shard_map():
  tx, params, grads, *_ = reference_case()

  def replica(g, w):
    g = jax.tree.map(lambda x: jax.lax.pmean(x, "data"), g)
    out, state = tx.update(g, tx.init(w), w)
    return out, agc_metrics(state)

  out, metrics = jax.pmap(replica, axis_name="data", in_axes=(0, None))(grads, params)
  for i in (0, 7):
    assert_same(out, metrics, i)

  local = lambda g, w: replica(jax.tree.map(lambda x: x[0], g), w)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  specs = PartitionSpec("data"), PartitionSpec()
  assert_same(*jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))(grads, params))


@EIGHT
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_parameters(axis, kind):
  """Parameters and gradients are split along their inputs (reduced axes) and along their outputs (unit axes)."""
  tx, params, _, mean, *_ = reference_case()
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType[kind],))
  spec = lambda x: PartitionSpec(*(None,) * (x.ndim + axis), "data") if x.ndim >= -axis else PartitionSpec()
  shardings = jax.tree.map(lambda x: NamedSharding(mesh, spec(x)), params)
  placed = jax.device_put(mean, shardings), jax.device_put(params, shardings)
  with jax.set_mesh(mesh):
    out, state = jax.jit(lambda g, w: tx.update(g, tx.init(w), w), out_shardings=(shardings, None))(*placed)
  assert out["conv"]["kernel"].sharding.is_equivalent_to(shardings["conv"]["kernel"], 4)
  assert_same(out, agc_metrics(state))
