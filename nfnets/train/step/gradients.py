"""The loss of a batch and its gradients: on one device, over a mesh, in parts, and SAM's."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nfnets.config import Config, DataConfig
from nfnets.models import layers
from nfnets.optim import zero_frozen
from nfnets.train.step import losses, sharding

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]
Gradients = tuple[nnx.State, jax.Array, nnx.State, Metrics]  # of the mean loss; that loss; new running statistics; sums


def normalise(images: jax.Array, config: DataConfig) -> jax.Array:
  """Normalises images, uint8 [B, H, W, 3] → float32: (x - mean) / std by channel."""
  return (images.astype(jnp.float32) - jnp.asarray(config.mean)) / jnp.asarray(config.std)


def step_key(config: Config, step: jax.Array) -> jax.Array:
  """The key of a step's dropout and stochastic depth: a function of (seed, step), so that nothing need be saved."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), step)  # 1: not the parameters' key


def batch_loss(
  config: Config,
  graph: nnx.GraphDef,
  params: nnx.State,
  stats: nnx.State,
  batch: Batch,
  tap: Callable[[str, jax.Array], None] | None = None,
) -> tuple[jax.Array, tuple[nnx.State, Metrics]]:
  """The mean loss of a training batch, float32 [].

  Args:
    config: normalisation, loss and label smoothing are read.
    graph: of the network; that of a standardized one (`_standardized`) takes its kernels as they are.
    params, stats: parameters and running statistics.
    batch: "image" uint8 [B, H, W, 3], "label" int [B] or float [B, classes], "mix_label" and "ratio" where images are mixed,
      and "key" [B] (`row_keys`) for dropout and stochastic depth.
    tap: called with each layer's name and output.

  Returns:
    (loss, (new running statistics, sums of loss, top-1, top-5 and count)).
  """
  network = nnx.merge(graph, params, stats, copy=True)  # a copy: BatchNorm moves its statistics within this trace
  outputs = network.outputs(
    normalise(batch["image"], config.data), train=True, rngs=batch["key"], **({"tap": tap} if tap else {})
  )
  image_losses = losses.cross_entropy(
    outputs["logits"],
    batch["label"],
    label_smoothing=config.label_smoothing,
    kind=config.loss,
    mix_labels=batch.get("mix_label"),
    ratio=batch.get("ratio"),
  )
  sums = losses.metric_sums(outputs["logits"], heavier_label(batch), image_losses)
  return jnp.mean(image_losses), (nnx.state(network, nnx.BatchStat), sums)


def heavier_label(batch: Batch) -> jax.Array:
  """The label that an image has for the larger part, of which top-1 and top-5 count; where images are not mixed, its label."""
  labels = batch["label"]
  if "mix_label" not in batch:
    return labels
  first = (batch["ratio"] >= 0.5).reshape(-1, *[1] * (labels.ndim - 1))
  return jnp.where(first, labels, batch["mix_label"])


def row_keys(key: jax.Array, rows: int, axis: str | None = None) -> jax.Array:
  """One key for each row of the global batch, [rows]; with `axis`, for this device's rows of it."""
  first = 0 if axis is None else jax.lax.axis_index(axis) * rows
  return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(rows))


def local_gradients(
  config: Config, graph: nnx.GraphDef, params: nnx.State, stats: nnx.State, batch: Batch, *, axis: str | None = None
) -> Gradients:
  """The gradients of one device's images.

  Weights are standardized once, however many parts config.accumulate says, and the gradient is pulled back once.

  Args:
    config, graph, params, stats: see `batch_loss`.
    batch: as in `batch_loss`, with its "key".
    axis: of a `jax.pmap` or `jax.shard_map`, over whose devices gradients, loss and statistics are averaged and sums added up.
  """
  if config.optim.sam_rho:
    params = ascended(config, graph, params, stats, batch)
  weights, pull_back, graph = jax.vjp(functools.partial(_standardized, graph, stats), params, has_aux=True)
  grads, loss, stats, sums = _in_parts(config, graph, weights, stats, batch)
  (grads,) = pull_back(grads)
  if axis is not None:
    grads, loss, stats = jax.lax.pmean((grads, loss, stats), axis)
    sums = jax.lax.psum(sums, axis)
  return grads, loss, stats, sums


def mesh_gradients(
  config: Config, graph: nnx.GraphDef, mesh: Mesh, params: nnx.State, stats: nnx.State, batch: Batch
) -> Gradients:
  """The gradients of the global batch over a mesh: each device takes its rows, then float32 gradients are averaged, once.

  Where config.shard divides the state, all weights are gathered after their standardization, and each device keeps its part of
  the gradients. BatchNorm over the global batch needs all rows at once: XLA then divides the whole computation, and averages
  the gradients of each part in the dtype of the convolutions.
  """
  whole, rows = PartitionSpec(), PartitionSpec(sharding.AXIS)
  spec = lambda x: sharding.state_sharding(mesh, x.shape, config.shard).spec
  specs = jax.tree.map(spec, params)
  if config.optim.sam_rho:
    local = functools.partial(local_gradients, config, graph, axis=sharding.AXIS)
    return jax.shard_map(local, mesh=mesh, in_specs=(whole, whole, rows), out_specs=whole, check_vma=False)(params, stats, batch)
  weights, pull_back, graph = jax.vjp(functools.partial(_standardized, graph, stats), params, has_aux=True)
  if needs_all_rows(config, stats):
    place = lambda tree, spec_of: jax.lax.with_sharding_constraint(
      tree, jax.tree.map(lambda x: NamedSharding(mesh, spec_of(x)), tree)
    )
    grads, loss, stats, sums = _in_parts(config, graph, place(weights, lambda x: whole), stats, batch, mesh)
    return pull_back(place(grads, spec))[0], loss, stats, sums

  def on_each_device(weights: nnx.State, stats: nnx.State, batch: Batch) -> Gradients:
    grads, loss, stats, sums = _in_parts(config, graph, weights, stats, batch)
    loss, stats = jax.lax.pmean((loss, stats), sharding.AXIS)
    return jax.tree.map(_mean_of_part, grads, specs), loss, stats, jax.lax.psum(sums, sharding.AXIS)

  grads, loss, stats, sums = jax.shard_map(
    on_each_device, mesh=mesh, in_specs=(whole, whole, rows), out_specs=(specs, whole, whole, whole), check_vma=False
  )(weights, stats, batch)
  return pull_back(grads)[0], loss, stats, sums


def needs_all_rows(config: Config, stats: nnx.State) -> bool:
  """Whether a device cannot take its rows alone: BatchNorm over the global batch."""
  return bool(jax.tree.leaves(stats)) and config.batch_stats == "global" and not config.optim.sam_rho


def rows_normalized(config: Config, stats: nnx.State, devices: int) -> int | None:
  """How many images of a batch are normalized by one mean and variance; None without BatchNorm."""
  if not jax.tree.leaves(stats):
    return None
  return config.batch // config.accumulate // (devices if config.batch_stats == "device" else 1)


def rows_ascended(config: Config, devices: int) -> int | None:
  """How many images of a batch each device's ascent of SAM belongs to; None without SAM."""
  return config.batch // devices if config.optim.sam_rho else None


def _mean_of_part(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  """The devices' mean of `x`: whole on each device, or where `spec` splits it, each device's part."""
  if sharding.AXIS not in spec:
    return jax.lax.pmean(x, sharding.AXIS)
  total = jax.lax.psum_scatter(x, sharding.AXIS, scatter_dimension=spec.index(sharding.AXIS), tiled=True)
  return total / jax.lax.axis_size(sharding.AXIS)


def _standardized(graph: nnx.GraphDef, stats: nnx.State, params: nnx.State) -> tuple[nnx.State, nnx.GraphDef]:
  """Standardizes the weights; returns them and the graph definition that takes them as they are."""
  network = nnx.merge(graph, params, stats, copy=True)
  layers.standardize(network)
  graph, weights, _ = nnx.split(network, nnx.Param, nnx.BatchStat)
  return weights, graph


def _in_parts(
  config: Config, graph: nnx.GraphDef, weights: nnx.State, stats: nnx.State, batch: Batch, mesh: Mesh | None = None
) -> Gradients:
  """Computes gradients with respect to standardized weights: the mean over config.accumulate parts, taken one by one."""
  loss_of = lambda weights, stats, part: batch_loss(config, graph, weights, stats, part)

  def of_part(stats: nnx.State, part: Batch) -> Gradients:
    (loss, (stats, sums)), grads = jax.value_and_grad(loss_of, has_aux=True)(weights, stats, part)
    return grads, loss, stats, sums

  def add(carry: Gradients, part: Batch) -> tuple[Gradients, None]:
    grads, loss, stats, sums = of_part(carry[2], part)
    before = carry[0], carry[1], carry[3]
    grads, loss, sums = jax.tree.map(jnp.add, before, (grads, loss, sums))
    return (grads, loss, stats, sums), None

  if config.accumulate == 1:
    return of_part(stats, batch)
  parts = _divided(batch, config.accumulate, mesh)
  shapes = jax.eval_shape(of_part, stats, jax.tree.map(lambda x: x[0], parts))
  grads, loss, _, sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  (grads, loss, stats, sums), _ = jax.lax.scan(add, (grads, loss, stats, sums), parts)
  grads, loss = jax.tree.map(lambda x: x / config.accumulate, (grads, loss))
  return grads, loss, stats, sums


def _divided(batch: Batch, parts: int, mesh: Mesh | None) -> Batch:
  """Divides a batch, [B, …] → [parts, B / parts, …]; every device keeps its own rows, as many for each part."""

  def divide(x: jax.Array) -> jax.Array:
    devices = 1 if mesh is None else mesh.size
    x = jnp.moveaxis(x.reshape(devices, parts, -1, *x.shape[1:]), 0, 1).reshape(parts, -1, *x.shape[1:])
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, sharding.AXIS)))

  return jax.tree.map(divide, batch)


def ascended(config: Config, graph: nnx.GraphDef, params: nnx.State, stats: nnx.State, batch: Batch) -> nnx.State:
  """Moves the weights uphill by sam_rho along the gradient of a part of this device's images (SAM, 2010.01412, eq. 2)."""
  rows = max(1, round(config.optim.sam_share * len(batch["image"])))
  part = {**jax.tree.map(lambda x: x[:rows], batch), "key": layers.fold_in(batch["key"][:rows], 1 << 31)}
  grads = zero_frozen(config.optim, jax.grad(lambda params: batch_loss(config, graph, params, stats, part)[0])(params))
  scale = config.optim.sam_rho / jnp.maximum(optax.tree.norm(grads), 1e-12)
  return jax.tree.map(lambda p, g: p + scale * g, params, grads)
