"""The training step and the evaluation step: pure functions of (state, batch), and their compiled forms over a mesh."""
import contextlib
import dataclasses
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
from nfnets.optim import ema_update
from nfnets.train import losses
from nfnets.train.mesh import AXIS, batch_sharding, replicated, state_sharding
from nfnets.train.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]
Gradients = tuple[nnx.State, jax.Array, nnx.State, Metrics]
LOSS_DECAY = 0.98  # of the running mean that a spike of the loss is measured against: some 50 steps


def normalise(images: jax.Array, config: DataConfig) -> jax.Array:
  """uint8 [B, H, W, 3] → float32, (x - mean) / std by channel."""
  return (images.astype(jnp.float32) - jnp.asarray(config.mean)) / jnp.asarray(config.std)


def step_key(config: Config, step: jax.Array) -> jax.Array:
  """What a step's dropout and stochastic depth follow from: a function of (seed, step), so that nothing need be saved."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), step)  # 1: not the parameters' key


def all_finite(tree: Any) -> jax.Array:
  """Whether no number of the tree is NaN or infinite: bool []. (A norm would overflow for finite ones.)"""
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def batch_loss(config: Config, graph: nnx.GraphDef, params: nnx.State, stats: nnx.State, batch: Batch,
               tap: Callable[[str, jax.Array], None] | None = None, *, standardized: bool = False) -> tuple[
                   jax.Array, tuple[nnx.State, Metrics]]:
  """(mean loss, (new running statistics, sums of loss, top-1, top-5 and count)) of a training batch.

  standardized: the kernels in `params` are standardized already.
  batch: "image" uint8 [B, H, W, 3], "label" int [B] or float [B, classes], "mix_label" and "ratio" where images are mixed,
  and "key" [B] (`row_keys`) for dropout and stochastic depth.
  """
  network = nnx.merge(graph, params, stats, copy=True)  # a copy: BatchNorm moves its statistics within this trace
  with layers.standardized() if standardized else contextlib.nullcontext():
    outputs = network.outputs(normalise(batch["image"], config.data), train=True, rngs=batch["key"],
                              **({"tap": tap} if tap else {}))
  each = losses.cross_entropy(outputs["logits"], batch["label"], label_smoothing=config.label_smoothing, kind=config.loss,
                              mix_labels=batch.get("mix_label"), ratio=batch.get("ratio"))
  sums = losses.metric_sums(outputs["logits"], batch["label"], each)
  return jnp.mean(each), (nnx.state(network, nnx.BatchStat), sums)


def row_keys(key: jax.Array, rows: int, axis: str | None = None) -> jax.Array:
  """One key for each row of the global batch, [rows]; with `axis`, for this device's rows of it."""
  first = 0 if axis is None else jax.lax.axis_index(axis) * rows
  return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(rows))


def local_gradients(config: Config, graph: nnx.GraphDef, params: nnx.State, stats: nnx.State, batch: Batch, *,
                    axis: str | None = None) -> Gradients:
  """(gradients of the mean loss, that loss, new running statistics, sums over the batch), of one device.

  batch: as in `batch_loss`, with its "key". With `axis`, of a `jax.pmap` or `jax.shard_map`, all are averaged over its devices
  (the sums: added up). Weights are standardized once, however many parts config.accumulate says, and the gradient is pulled
  back once.
  """
  if config.optim.sam_rho:
    params = _ascended(config, graph, params, stats, batch)
  weights, pull_back = jax.vjp(functools.partial(_standardized, graph, stats), params)
  grads, loss, stats, sums = _in_parts(config, graph, weights, stats, batch)
  (grads,) = pull_back(grads)
  if axis is not None:
    grads, loss, stats = jax.lax.pmean((grads, loss, stats), axis)
    sums = jax.lax.psum(sums, axis)
  return grads, loss, stats, sums


def mesh_gradients(config: Config, graph: nnx.GraphDef, mesh: Mesh, params: nnx.State, stats: nnx.State,
                   batch: Batch) -> Gradients:
  """The same of the global batch, over a mesh: each device takes its rows, then the float32 gradients are averaged, once.

  Where config.shard divides the state, weights are gathered after their standardization, and each device is left its part of
  the gradients. BatchNorm over the global batch needs all rows at once: XLA is then left to divide the whole computation, and
  averages each part's gradients, in the dtype of the convolutions.
  """
  whole, rows = PartitionSpec(), PartitionSpec(AXIS)
  spec = lambda x: state_sharding(mesh, x.shape, config.shard).spec
  specs = jax.tree.map(spec, params)
  if config.optim.sam_rho:
    local = functools.partial(local_gradients, config, graph, axis=AXIS)
    return jax.shard_map(local, mesh=mesh, in_specs=(whole, whole, rows), out_specs=whole, check_vma=False)(params, stats, batch)
  weights, pull_back = jax.vjp(functools.partial(_standardized, graph, stats), params)
  if needs_all_rows(config, stats):
    place = lambda tree, spec_of: jax.lax.with_sharding_constraint(
        tree, jax.tree.map(lambda x: NamedSharding(mesh, spec_of(x)), tree))
    grads, *rest = _in_parts(config, graph, place(weights, lambda x: whole), stats, batch, mesh)
    return pull_back(place(grads, spec))[0], *rest

  def on_each(weights: nnx.State, stats: nnx.State, batch: Batch) -> Gradients:
    grads, loss, stats, sums = _in_parts(config, graph, weights, stats, batch)
    loss, stats = jax.lax.pmean((loss, stats), AXIS)
    return jax.tree.map(_mean_of_part, grads, specs), loss, stats, jax.lax.psum(sums, AXIS)
  grads, *rest = jax.shard_map(on_each, mesh=mesh, in_specs=(whole, whole, rows), out_specs=(specs, whole, whole, whole),
                               check_vma=False)(weights, stats, batch)
  return pull_back(grads)[0], *rest


def needs_all_rows(config: Config, stats: nnx.State) -> bool:
  """Whether a device cannot take its rows alone: BatchNorm over the global batch."""
  return bool(jax.tree.leaves(stats)) and config.batch_stats == "global" and not config.optim.sam_rho


def rows_normalized(config: Config, stats: nnx.State, devices: int) -> int | None:
  """How many images of a batch are normalized by one mean and variance; None without BatchNorm."""
  if not jax.tree.leaves(stats):
    return None
  return config.batch // config.accumulate // (devices if config.batch_stats == "device" else 1)


def _mean_of_part(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  """The devices' mean: all of it on each, or where `spec` divides it each device's part."""
  if AXIS not in spec:
    return jax.lax.pmean(x, AXIS)
  return jax.lax.psum_scatter(x, AXIS, scatter_dimension=spec.index(AXIS), tiled=True) / jax.lax.axis_size(AXIS)


def _standardized(graph: nnx.GraphDef, stats: nnx.State, params: nnx.State) -> nnx.State:
  network = nnx.merge(graph, params, stats, copy=True)
  layers.standardize(network)
  return nnx.state(network, nnx.Param)


def _in_parts(config: Config, graph: nnx.GraphDef, weights: nnx.State, stats: nnx.State, batch: Batch,
              mesh: Mesh | None = None) -> Gradients:
  """Gradients with respect to standardized weights: the mean over config.accumulate parts of the batch, taken one by one."""
  loss_of = lambda weights, stats, part: batch_loss(config, graph, weights, stats, part, standardized=True)

  def one(stats: nnx.State, part: Batch) -> Gradients:
    (loss, (stats, sums)), grads = jax.value_and_grad(loss_of, has_aux=True)(weights, stats, part)
    return grads, loss, stats, sums

  def add(carry: Gradients, part: Batch) -> tuple[Gradients, None]:
    grads, loss, stats, sums = one(carry[2], part)
    before = carry[0], carry[1], carry[3]
    grads, loss, sums = jax.tree.map(jnp.add, before, (grads, loss, sums))
    return (grads, loss, stats, sums), None

  if config.accumulate == 1:
    return one(stats, batch)
  parts = _divided(batch, config.accumulate, mesh)
  shapes = jax.eval_shape(one, stats, jax.tree.map(lambda x: x[0], parts))
  grads, loss, _, sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  (grads, loss, stats, sums), _ = jax.lax.scan(add, (grads, loss, stats, sums), parts)
  grads, loss = jax.tree.map(lambda x: x / config.accumulate, (grads, loss))
  return grads, loss, stats, sums


def _divided(batch: Batch, parts: int, mesh: Mesh | None) -> Batch:
  """[B, …] → [parts, B / parts, …]; every device keeps its own rows and takes as many of them for each part."""
  def divide(x: jax.Array) -> jax.Array:
    devices = 1 if mesh is None else mesh.size
    x = jnp.moveaxis(x.reshape(devices, parts, -1, *x.shape[1:]), 0, 1).reshape(parts, -1, *x.shape[1:])
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, AXIS)))
  return jax.tree.map(divide, batch)


def _ascended(config: Config, graph: nnx.GraphDef, params: nnx.State, stats: nnx.State, batch: Batch) -> nnx.State:
  """SAM's weights (2010.01412, equation 2): uphill by sam_rho along the gradient of a part of this device's images."""
  rows = max(1, round(config.optim.sam_share * len(batch["image"])))
  part = {**jax.tree.map(lambda x: x[:rows], batch), "key": layers.fold_in(batch["key"][:rows], 1 << 31)}
  grads = jax.grad(lambda params: batch_loss(config, graph, params, stats, part)[0])(params)
  scale = config.optim.sam_rho / jnp.maximum(optax.tree.norm(grads), 1e-12)
  return jax.tree.map(lambda p, g: p + scale * g, params, grads)


def make_train_step(config: Config, graph: nnx.GraphDef, optimizer: optax.GradientTransformation, *, mesh: Mesh | None = None,
                    axis: str | None = None) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The pure step: gradients → optimizer (AGC first) → parameters → EMA, all float32.

  For one device or, with the `mesh` that `train_step_over` compiles for, for the global batch; with `axis`, for each device's
  part of it in a `jax.pmap(axis_name=axis)` or `jax.shard_map` of one's own, the state alike everywhere.

  Metrics are sums over the batch ("loss_sum", "top1", "top5", "count"), "grad_norm" before clipping, and "bad". A bad step (see
  config.on_bad_step) changes nothing; unless bad steps are skipped, nothing changes after it either. What hosts have to say to
  each other, batch["host"] int32 [devices, 2], comes back as the metrics "stop" (its first column's maximum) and "corrupt" (the
  other's sum).
  """
  if mesh is not None and mesh.size > 1:
    gradients = functools.partial(mesh_gradients, config, graph, mesh)
  else:
    gradients = functools.partial(local_gradients, config, graph, axis=axis)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    host, batch = batch.get("host"), {name: rows for name, rows in batch.items() if name != "host"}
    said = {} if host is None else {"stop": jnp.max(host[:, 0]), "corrupt": jnp.sum(host[:, 1])}
    keys = row_keys(step_key(config, state.step), len(batch["image"]), axis)
    grads, loss, stats, sums = gradients(state.params, state.stats, {**batch, "key": keys})
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = None if state.ema is None else ema_update(state.ema, (params, stats), state.step, config.optim.ema_decay)
    bad = ~(jnp.isfinite(loss) & all_finite(grads) & all_finite((params, stats)))
    if config.spike:
      bad |= (state.loss_mean > 0) & (loss > config.spike * state.loss_mean)
    halted = state.halted if config.on_bad_step == "skip" else state.halted | bad
    new = TrainState(step=state.step, params=params, stats=stats, opt_state=opt_state, ema=average, halted=halted,
                     loss_mean=jnp.where(state.loss_mean > 0, LOSS_DECAY * state.loss_mean + (1 - LOSS_DECAY) * loss, loss),
                     bad_steps=state.bad_steps, passed_over=state.passed_over)
    kept = jax.tree.map(lambda before, after: jnp.where(halted | bad, before, after), state, new)
    kept = dataclasses.replace(kept, halted=halted, step=state.step + ~halted, bad_steps=state.bad_steps + (bad & ~state.halted))
    return kept, {**sums, **said, "grad_norm": optax.tree.norm(grads), "bad": bad}
  return train_step


def make_eval_step(config: Config, graph: nnx.GraphDef) -> Callable[[nnx.State, nnx.State, Batch], Metrics]:
  """The pure evaluation step: sums over the images that the batch's "mask" counts; plain cross-entropy, no smoothing."""
  def eval_step(params: nnx.State, stats: nnx.State, batch: Batch) -> Metrics:
    logits = nnx.merge(graph, params, stats)(normalise(batch["image"], config.data))
    each = losses.cross_entropy(logits, batch["label"], kind=config.loss, mask=batch["mask"])
    return losses.metric_sums(logits, batch["label"], each, batch["mask"])
  return eval_step


def train_step_over(config: Config, mesh: Mesh, graph: nnx.GraphDef, optimizer: optax.GradientTransformation,
                    like: TrainState) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The step compiled over the mesh, for a state that lies as `like` says (`meshes.place`) and a batch split over the devices.

  The old state's memory becomes the new one's. Raises ValueError for SAM with BatchNorm over the global batch.
  """
  if config.optim.sam_rho and jax.tree.leaves(like.stats) and config.batch_stats == "global" and mesh.size > 1:
    raise ValueError("config.batch_stats='global' with config.optim.sam_rho: each device climbs by itself, with statistics of "
                     "its own images; expected config.batch_stats='device'")
  places = jax.tree.map(lambda x: x.sharding, like)
  step = make_train_step(config, graph, optimizer, mesh=mesh)
  return jax.jit(step, in_shardings=(places, batch_sharding(mesh)), out_shardings=(places, replicated(mesh)), donate_argnums=0)


def eval_step_over(config: Config, mesh: Mesh, graph: nnx.GraphDef) -> Callable[[nnx.State, nnx.State, Batch], Metrics]:
  """The evaluation step compiled over the mesh: weights as they lie, the batch split over the devices."""
  whole = replicated(mesh)

  def eval_step(params: nnx.State, stats: nnx.State, batch: Batch) -> Metrics:
    gathered = jax.lax.with_sharding_constraint((params, stats), jax.tree.map(lambda x: whole, (params, stats)))
    return make_eval_step(config, graph)(*gathered, batch)
  return jax.jit(eval_step, in_shardings=(None, None, batch_sharding(mesh)), out_shardings=whole)
