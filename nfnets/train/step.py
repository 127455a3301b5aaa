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
LOSS_DECAY = 0.98  # of the running mean that a spike of the loss is measured against: some 50 steps


def normalise(images: jax.Array, config: DataConfig) -> jax.Array:
  """uint8 [B, H, W, 3] → float32, (x - mean) / std by channel."""
  return (images.astype(jnp.float32) - jnp.asarray(config.mean)) / jnp.asarray(config.std)


def step_key(config: Config, step: jax.Array) -> jax.Array:
  """The key of a step's dropout and stochastic depth: a function of (seed, step), so that nothing need be saved."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), step)  # 1: not the parameters' key


def all_finite(tree: Any) -> jax.Array:
  """Whether no number of the tree is NaN or infinite: bool []. (A norm would overflow for finite ones.)"""
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def batch_loss(config: Config, graph: nnx.GraphDef, params: nnx.State, stats: nnx.State, batch: Batch, key: jax.Array,
               tap: Callable[[str, jax.Array], None] | None = None, *, standardized: bool = False) -> tuple[
                   jax.Array, tuple[nnx.State, Metrics]]:
  """(mean loss, (new running statistics, sums of loss, top-1, top-5 and count)) of a training batch.

  standardized: the kernels in `params` are standardized already.
  batch: "image" uint8 [B, H, W, 3], "label" int [B] or float [B, classes], and "mix_label", "ratio" where images are mixed.
  """
  network = nnx.merge(graph, params, stats, copy=True)  # a copy: BatchNorm moves its statistics within this trace
  with layers.standardized() if standardized else contextlib.nullcontext():
    outputs = network.outputs(normalise(batch["image"], config.data), train=True, rngs=key, **({"tap": tap} if tap else {}))
  each = losses.cross_entropy(outputs["logits"], batch["label"], label_smoothing=config.label_smoothing, kind=config.loss,
                              mix_labels=batch.get("mix_label"), ratio=batch.get("ratio"))
  sums = losses.metric_sums(outputs["logits"], batch["label"], each)
  return jnp.mean(each), (nnx.state(network, nnx.BatchStat), sums)


def local_gradients(config: Config, graph: nnx.GraphDef, params: nnx.State, stats: nnx.State, batch: Batch, key: jax.Array, *,
                    mesh: Mesh | None = None, axis: str | None = None) -> tuple[nnx.State, jax.Array, nnx.State, Metrics]:
  """(gradients of the mean loss, that loss, new running statistics, sums over the batch), in config.accumulate parts.

  Weights are standardized once, however many parts there are, and the gradient is pulled back once. With `axis`, everything is
  averaged (sums: added up) over that axis of a `jax.pmap` or `jax.shard_map`, whose devices each see their own `batch`; else the
  batch is the global one, and `mesh` (where there is one) says how it and the parameters lie.
  """
  if axis is not None:
    key = jax.random.fold_in(key, jax.lax.axis_index(axis))
  if config.optim.sam_rho:
    params = _ascended(config, graph, params, stats, batch, key)
  whole, split = _layouts(config, mesh, params)
  weights, pull_back = jax.vjp(lambda params: _standardized(graph, params, stats), params)
  weights = whole(weights)
  loss_of = lambda weights, stats, batch, key: batch_loss(config, graph, weights, stats, batch, key, standardized=True)
  gradients_of = jax.value_and_grad(loss_of, has_aux=True)

  def one(stats: nnx.State, part: Batch, key: jax.Array):
    (loss, (stats, sums)), grads = gradients_of(weights, stats, part, key)
    return split(grads), loss, stats, sums

  if config.accumulate == 1:
    grads, loss, stats, sums = one(stats, batch, key)
  else:
    def add(carry, part):
      *before, stats = carry
      grads, loss, stats, sums = one(stats, part[1], jax.random.fold_in(key, part[0]))
      return (*jax.tree.map(jnp.add, tuple(before), (grads, loss, sums)), stats), None
    parts = _divided(batch, config.accumulate, mesh if axis is None else None)
    shapes = jax.eval_shape(one, stats, jax.tree.map(lambda x: x[0], parts), key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[1], shapes[3]))
    (grads, loss, sums, stats), _ = jax.lax.scan(add, (*zeros, stats), (jnp.arange(config.accumulate), parts))
    grads, loss = jax.tree.map(lambda x: x / config.accumulate, (grads, loss))
  (grads,) = pull_back(grads)
  if axis is not None:
    grads, loss, stats = jax.lax.pmean((grads, loss, stats), axis)
    sums = jax.lax.psum(sums, axis)
  return grads, loss, stats, sums


def _standardized(graph: nnx.GraphDef, params: nnx.State, stats: nnx.State) -> nnx.State:
  network = nnx.merge(graph, params, stats, copy=True)
  layers.standardize(network)
  return nnx.state(network, nnx.Param)


def _layouts(config: Config, mesh: Mesh | None, params: nnx.State) -> tuple[Callable, Callable]:
  """What gathers the weights for the forward pass, and what leaves each device its part of the gradients."""
  if mesh is None or not config.shard:
    return (lambda tree: tree), (lambda tree: tree)
  places = jax.tree.map(lambda x: state_sharding(mesh, x.shape, True), params)
  everywhere = jax.tree.map(lambda x: replicated(mesh), params)
  return (lambda tree: jax.lax.with_sharding_constraint(tree, everywhere),
          lambda tree: jax.lax.with_sharding_constraint(tree, places))


def _divided(batch: Batch, parts: int, mesh: Mesh | None) -> Batch:
  """[B, …] → [parts, B / parts, …]; every device keeps its own rows and takes as many of them for each part."""
  def divide(x: jax.Array) -> jax.Array:
    devices = 1 if mesh is None else mesh.size
    x = jnp.moveaxis(x.reshape(devices, parts, -1, *x.shape[1:]), 0, 1).reshape(parts, -1, *x.shape[1:])
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, AXIS)))
  return jax.tree.map(divide, batch)


def _ascended(config: Config, graph: nnx.GraphDef, params: nnx.State, stats: nnx.State, batch: Batch,
              key: jax.Array) -> nnx.State:
  """SAM's weights (2010.01412, equation 2): uphill by sam_rho along the gradient of a part of this device's images."""
  rows = max(1, round(config.optim.sam_share * len(batch["image"])))
  part = jax.tree.map(lambda x: x[:rows], batch)
  grads = jax.grad(lambda params: batch_loss(config, graph, params, stats, part, jax.random.fold_in(key, 1 << 31))[0])(params)
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
  gradients = functools.partial(local_gradients, config, graph, mesh=mesh, axis=axis)
  if mesh is not None and (config.optim.sam_rho or config.batch_stats == "device"):
    whole, rows = PartitionSpec(), PartitionSpec(AXIS)
    gradients = jax.shard_map(functools.partial(local_gradients, config, graph, axis=AXIS), mesh=mesh,
                              in_specs=(whole, whole, rows, whole), out_specs=whole, check_vma=False)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    host, batch = batch.get("host"), {name: rows for name, rows in batch.items() if name != "host"}
    said = {} if host is None else {"stop": jnp.max(host[:, 0]), "corrupt": jnp.sum(host[:, 1])}
    grads, loss, stats, sums = gradients(state.params, state.stats, batch, step_key(config, state.step))
    grads = _layouts(config, mesh, state.params)[1](grads)
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

  The old state's memory becomes the new one's.
  """
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
