"""The training step and the evaluation step: pure functions of (state, batch), and their compiled forms over a mesh."""

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from nfnets.agc import unit_norm
from nfnets.config import Config
from nfnets.errors import UserError
from nfnets.optim import ema_update, zero_frozen
from nfnets.train.step import losses, sharding
from nfnets.train.step.gradients import (
  Batch,
  Metrics,
  local_gradients,
  mesh_gradients,
  needs_all_rows,
  normalise,
  row_keys,
  step_key,
)
from nfnets.train.step.state import TrainState

LOSS_DECAY = 0.98  # of the running mean that a spike of the loss is measured against: some 50 steps
_STEP_NUMBERS = itertools.count()


def all_finite(tree: Any) -> jax.Array:
  """Whether no number of the tree's arrays is NaN or infinite: bool []."""
  return jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda x: jnp.isfinite(x).all(), tree), jnp.array(True))


def norm(tree: Any) -> jax.Array:
  """The L2 norm of all the tree's numbers, []: by way of the norms that AGC takes too, so that XLA sums squares once."""
  return jnp.sqrt(jax.tree.reduce(jnp.add, jax.tree.map(_square, tree), jnp.zeros([])))


@jax.jit  # so that it is traced once for each shape
def _square(x: jax.Array) -> jax.Array:
  """The square of an array's L2 norm, []."""
  return jnp.sum(unit_norm(x, (x.ndim - 1,) if x.ndim > 1 else ()) ** 2)


def is_bad(loss: jax.Array, grads: Any, params: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
  """Whether a step must change nothing, and the gradients' norm: bool [] and float32 [].

  It must where the loss, the norm of the gradients, that of the parameters before the step, or a new running statistic is NaN or
  infinite; a norm is so from 1.8e19 on, since squares overflow. The parameters after the step need no look: from finite norms, no
  learning rate, momentum or decay that OptimConfig allows makes an update that overflows. To look at them nonetheless would make
  every update twice: what is kept depends on all of them, so that they would be written down, or computed again (docs/speed.md).

  The statistics are looked at in a branch, only where all else is finite, since XLA fuses what computes an array into the
  reduction that reads it, on CPUs several times over, but not across a branch.
  """
  grad_norm = norm(grads)
  fine = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(norm(params))
  return ~jax.lax.cond(fine, all_finite, lambda stats: jnp.array(False), stats), grad_norm


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

  The batch is that of `batch_loss` without its "key". Metrics are sums over the batch ("loss_sum", "top1", "top5", "count"),
  "grad_norm" before clipping, and "bad". A bad step (see config.on_bad_step) changes nothing; unless bad steps are skipped,
  nothing changes after it either. An `optimizer` that is not of `optim.make_optimizer` must make finite updates of finite
  gradients: they are not looked at (`is_bad`).

  What the processes tell each other travels with the batch, a row for each device: "stop" int32 [devices], 1 where a process was
  asked to stop, comes back as its maximum, and "corrupt" int32 [devices], the number of a record found corrupt, plus 1, comes
  back whole.

  Raises:
    UserError: when it is traced, `axis` with BatchNorm over the global batch, whose images no device has together.
  """
  if mesh is not None and mesh.size > 1:
    gradients = functools.partial(mesh_gradients, config, graph, mesh)
  else:
    gradients = functools.partial(local_gradients, config, graph, axis=axis)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    if axis is not None and needs_all_rows(config, state.stats):
      raise UserError(
        f"config.batch_stats='global' with axis={axis!r}: each device would normalize its own images alone; expected "
        "config.batch_stats='device'"
      )
    messages = _messages(batch)
    batch = {name: rows for name, rows in batch.items() if name not in messages}
    keys = row_keys(step_key(config, state.step), len(batch["image"]), axis)
    grads, loss, stats, sums = gradients(state.params, state.stats, {**batch, "key": keys})
    grads = zero_frozen(config.optim, grads)
    bad, grad_norm = is_bad(loss, grads, state.params, stats)
    if config.spike:
      bad |= (state.loss_mean > 0) & (loss > config.spike * state.loss_mean)
    halted = state.halted if config.on_bad_step == "skip" else state.halted | bad
    keep = functools.partial(jax.tree.map, lambda before, after: jnp.where(halted | bad, before, after))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    # The average is taken of the parameters that are kept, so that XLA's CPU backend reads them and does not make them twice.
    params, stats = keep((state.params, state.stats), (optax.apply_updates(state.params, updates), stats))
    average, decay = state.ema, config.optim.ema_decay
    if average is not None and decay is not None:
      average = keep(average, ema_update(average, (params, stats), state.step, decay))
    loss_mean = jnp.where(state.loss_mean > 0, LOSS_DECAY * state.loss_mean + (1 - LOSS_DECAY) * loss, loss)
    kept = TrainState(
      step=state.step + ~halted,
      params=params,
      stats=stats,
      opt_state=keep(state.opt_state, opt_state),
      ema=average,
      halted=halted,
      loss_mean=keep(state.loss_mean, loss_mean),
      bad_steps=state.bad_steps + (bad & ~state.halted),
      passed_over=state.passed_over,
    )
    return kept, {**sums, **messages, "grad_norm": grad_norm, "bad": bad}

  return train_step


def _messages(batch: Batch) -> Metrics:
  """What the processes tell each other, see `make_train_step`, as the step gives it back."""
  give_back = {"stop": jnp.max, "corrupt": lambda rows: rows}
  return {name: function(batch[name]) for name, function in give_back.items() if name in batch}


def make_eval_step(config: Config, graph: nnx.GraphDef) -> Callable[[nnx.State, nnx.State, Batch], Metrics]:
  """The pure evaluation step: sums over the images that the batch's "mask" counts; plain cross-entropy, no smoothing.

  A batch with "stop" gives it back, as in `make_train_step`.
  """

  def eval_step(params: nnx.State, stats: nnx.State, batch: Batch) -> Metrics:
    logits = nnx.merge(graph, params, stats)(normalise(batch["image"], config.data))
    image_losses = losses.cross_entropy(logits, batch["label"], kind=config.loss, mask=batch["mask"])
    return {**losses.metric_sums(logits, batch["label"], image_losses, batch["mask"]), **_messages(batch)}

  return eval_step


def train_step_over(
  config: Config, mesh: Mesh, graph: nnx.GraphDef, optimizer: optax.GradientTransformation, like: TrainState
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The step compiled over the mesh, for a state that lies as `like` says (`sharding.place`) and a batch split over the devices.

  The old state's memory becomes the new one's.

  Raises:
    UserError: SAM with BatchNorm over the global batch.
  """
  if config.optim.sam_rho and jax.tree.leaves(like.stats) and config.batch_stats == "global" and mesh.size > 1:
    raise UserError(
      "config.batch_stats='global' with config.optim.sam_rho: each device ascends by itself, with statistics of "
      "its own images; expected config.batch_stats='device'"
    )
  places = jax.tree.map(lambda x: x.sharding, like)
  step = make_train_step(config, graph, optimizer, mesh=mesh)
  return jax.jit(
    _traced_once(step),
    in_shardings=(places, sharding.batch_sharding(mesh)),
    out_shardings=(places, sharding.replicated(mesh)),
    donate_argnums=0,
    compiler_options=_compiler_options(mesh),
  )


def eval_step_over(config: Config, mesh: Mesh, graph: nnx.GraphDef) -> Callable[[nnx.State, nnx.State, Batch], Metrics]:
  """The evaluation step compiled over the mesh: weights whole on each device, the batch split over the devices."""
  whole = sharding.replicated(mesh)
  step = make_eval_step(config, graph)
  places = (whole, whole, sharding.batch_sharding(mesh))
  return jax.jit(_traced_once(step), in_shardings=places, out_shardings=whole, compiler_options=_compiler_options(mesh))


def _compiler_options(mesh: Mesh) -> dict[str, int | str]:
  """What XLA is told about a program for CPUs, each option unless XLA_FLAGS names it. Figures: docs/speed.md.

  LLVM's lowest level of optimization: small networks compile sooner with it and take less time a step, large ones the same. No
  trees of sums: from 4,096 numbers on XLA's library YNN adds them up, with trees of its own, and for shorter sums, of which AGC
  has two for each bias and gain, a tree is several kernels where one does as well (a test looks at the errors).
  """
  if mesh.devices.flat[0].platform != "cpu":
    return {}
  options = {"xla_backend_optimization_level": 1, "xla_disable_hlo_passes": "tree_reduction_rewriter"}
  return {name: value for name, value in options.items() if name not in os.environ.get("XLA_FLAGS", "")}


def _traced_once(step: Callable) -> Callable:
  """A second trace of a compiled step is a bug: it costs a second compilation, unseen. chex raises AssertionError then."""
  name = step.__name__
  step.__name__ = f"{name} {next(_STEP_NUMBERS)}"  # chex counts by source and name, and a process may make several steps
  checked = chex.assert_max_traces(step, n=1)
  step.__name__ = checked.__name__ = name
  return checked
