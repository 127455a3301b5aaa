"""The training step and the evaluation step: pure functions of (state, batch), and their compiled forms over a mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from nfnets.config import Config
from nfnets.errors import UserError
from nfnets.optim import ema_update
from nfnets.train.step import losses, sharding
from nfnets.train.step.gradients import Batch, Metrics, local_gradients, mesh_gradients, normalise, row_keys, step_key
from nfnets.train.step.state import TrainState

LOSS_DECAY = 0.98  # of the running mean that a spike of the loss is measured against: some 50 steps


def all_finite(tree: Any) -> jax.Array:
  """Whether no number of the tree is NaN or infinite: bool []. (A norm would overflow for finite ones.)

  The barrier keeps XLA from fusing all that computes a leaf into the leaf's reduction, several times over: without it the step of
  NFNet-F0 compiles 100 s longer on CPU and runs no faster.
  """
  leaves = jax.lax.optimization_barrier(jax.tree.leaves(tree))
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def make_train_step(
  config: Config,
  graph: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  *,
  mesh: Mesh | None = None,
  axis: str | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
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
    new = TrainState(
      step=state.step,
      params=params,
      stats=stats,
      opt_state=opt_state,
      ema=average,
      halted=halted,
      loss_mean=jnp.where(state.loss_mean > 0, LOSS_DECAY * state.loss_mean + (1 - LOSS_DECAY) * loss, loss),
      bad_steps=state.bad_steps,
      passed_over=state.passed_over,
    )
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


def train_step_over(
  config: Config, mesh: Mesh, graph: nnx.GraphDef, optimizer: optax.GradientTransformation, like: TrainState
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The step compiled over the mesh, for a state that lies as `like` says (`meshes.place`) and a batch split over the devices.

  The old state's memory becomes the new one's. Raises UserError for SAM with BatchNorm over the global batch.
  """
  if config.optim.sam_rho and jax.tree.leaves(like.stats) and config.batch_stats == "global" and mesh.size > 1:
    raise UserError(
      "config.batch_stats='global' with config.optim.sam_rho: each device climbs by itself, with statistics of "
      "its own images; expected config.batch_stats='device'"
    )
  places = jax.tree.map(lambda x: x.sharding, like)
  step = make_train_step(config, graph, optimizer, mesh=mesh)
  return jax.jit(
    step,
    in_shardings=(places, sharding.batch_sharding(mesh)),
    out_shardings=(places, sharding.replicated(mesh)),
    donate_argnums=0,
  )


def eval_step_over(config: Config, mesh: Mesh, graph: nnx.GraphDef) -> Callable[[nnx.State, nnx.State, Batch], Metrics]:
  """The evaluation step compiled over the mesh: weights as they lie, the batch split over the devices."""
  whole = sharding.replicated(mesh)

  def eval_step(params: nnx.State, stats: nnx.State, batch: Batch) -> Metrics:
    gathered = jax.lax.with_sharding_constraint((params, stats), jax.tree.map(lambda x: whole, (params, stats)))
    return make_eval_step(config, graph)(*gathered, batch)

  return jax.jit(eval_step, in_shardings=(None, None, sharding.batch_sharding(mesh)), out_shardings=whole)
