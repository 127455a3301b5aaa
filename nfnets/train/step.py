"""The training step and the evaluation step: pure functions of (state, batch), and their compiled forms over a mesh."""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from nfnets.config import Config, DataConfig
from nfnets.optim import ema_update
from nfnets.train import losses
from nfnets.train.mesh import batch_sharding, replicated
from nfnets.train.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]


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
               tap: Callable[[str, jax.Array], None] | None = None) -> tuple[jax.Array, tuple[nnx.State, Metrics]]:
  """(mean loss, (new running statistics, sums of loss, top-1, top-5 and count)) of a training batch.

  batch: "image" uint8 [B, H, W, 3], "label" int [B] or float [B, classes], and "mix_label", "ratio" where images are mixed.
  """
  network = nnx.merge(graph, params, stats, copy=True)  # a copy: BatchNorm moves its statistics within this trace
  outputs = network.outputs(normalise(batch["image"], config.data), train=True, rngs=key, **({"tap": tap} if tap else {}))
  each = losses.cross_entropy(outputs["logits"], batch["label"], label_smoothing=config.label_smoothing, kind=config.loss,
                              mix_labels=batch.get("mix_label"), ratio=batch.get("ratio"))
  sums = losses.metric_sums(outputs["logits"], batch["label"], each)
  return jnp.mean(each), (nnx.state(network, nnx.BatchStat), sums)


def make_train_step(config: Config, graph: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Callable[
    [TrainState, Batch], tuple[TrainState, Metrics]]:
  """The pure step: gradients → optimizer (AGC first) → parameters → EMA, all float32.

  Metrics are sums over the batch ("loss_sum", "top1", "top5", "count") and "grad_norm" before clipping. A step whose loss,
  gradients or new parameters are not finite changes nothing but `halted`, and so do all that follow it.
  """
  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    loss_of = lambda params: batch_loss(config, graph, params, state.stats, batch, step_key(config, state.step))
    (loss, (stats, sums)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = None if state.ema is None else ema_update(state.ema, (params, stats), state.step, config.optim.ema_decay)
    halted = state.halted | ~(jnp.isfinite(loss) & all_finite(grads) & all_finite((params, stats)))
    new = TrainState(step=state.step + 1, params=params, stats=stats, opt_state=opt_state, ema=average, halted=halted)
    kept = jax.tree.map(lambda before, after: jnp.where(halted, before, after), state, new)
    return dataclasses.replace(kept, halted=halted), {**sums, "grad_norm": grad_norm}
  return train_step


def make_eval_step(config: Config, graph: nnx.GraphDef) -> Callable[[nnx.State, nnx.State, Batch], Metrics]:
  """The pure evaluation step: sums over the images that the batch's "mask" counts; plain cross-entropy, no smoothing."""
  def eval_step(params: nnx.State, stats: nnx.State, batch: Batch) -> Metrics:
    logits = nnx.merge(graph, params, stats)(normalise(batch["image"], config.data))
    each = losses.cross_entropy(logits, batch["label"], kind=config.loss, mask=batch["mask"])
    return losses.metric_sums(logits, batch["label"], each, batch["mask"])
  return eval_step


def compile_over(mesh: Mesh, step: Callable, *, donate_state: bool = False) -> Callable:
  """`jax.jit` of a step over the mesh: its last argument, the batch, is split, everything else replicated."""
  whole = replicated(mesh)
  if donate_state:  # (state, batch) → (state, metrics); the old state's memory becomes the new one's
    return jax.jit(step, in_shardings=(whole, batch_sharding(mesh)), out_shardings=(whole, whole), donate_argnums=0)
  return jax.jit(step, in_shardings=(whole, whole, batch_sharding(mesh)), out_shardings=whole)
