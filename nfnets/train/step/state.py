"""The state of a training run, and the one seam between NNX modules and pure functions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from nfnets import models
from nfnets.config import Config, ModelConfig
from nfnets.models import loops
from nfnets.optim import are_alike
from nfnets.train.step import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
  """Everything that a step changes: a pytree.

  Attributes:
    step: int32 [], updates done, those left out included.
    params, stats: nnx.States; stats are BatchNorm's running ones, else empty.
    opt_state: a dict by the optimizer's links, see `make_optimizer`.
    ema: averages of params and stats, or None.
    halted: bool [], True once a step was bad and config.on_bad_step does not skip: from then on nothing changes, so that `step`
      names the update that failed, and the state is the one before it.
    loss_mean: float32 [], running mean of the loss, which a spike is measured against; 0 before the first step.
    bad_steps: int32 [], updates skipped or rolled back so far.
    passed_over: int32 [], batches that rollbacks left out: the next step takes batch step + passed_over.
  """

  step: jax.Array
  params: nnx.State
  stats: nnx.State
  opt_state: Any
  ema: tuple[nnx.State, nnx.State] | None
  halted: jax.Array
  loss_mean: jax.Array
  bad_steps: jax.Array
  passed_over: jax.Array


def build_network(config: ModelConfig, num_classes: int, *, seed: int = 0) -> models.Network:
  """Makes the network of a config; raises what `models.create` raises."""
  return models.create(config.name, num_classes, rngs=seed, dtype=config.dtype, **config.all_overrides())


def split_network(network: models.Network) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
  """Splits a network into (graph, params, stats); `nnx.merge(graph, params, stats)` is the network again."""
  graph, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)
  return graph, params, stats


def split_for_training(network: models.Network, config: Config) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
  """`split_network`, with equal blocks stacked, in place, where loops run them (config.model.scan) and updates are alike.

  A step then takes a stack for one array, so that it compiles sooner and no loop begins by stacking. The optimizer must be
  that of `config.optim` with its default groups.
  """
  if config.model.scan and are_alike(nnx.state(network, nnx.Param), network.runs, config.optim):
    network.stack()
  return split_network(network)


def unstacked(state: TrainState) -> TrainState:
  """The state with every block by itself, as checkpoints hold it: of stacks, a second copy on the devices."""
  return loops.unstack(state)


def init_state(params: nnx.State, stats: nnx.State, optimizer: optax.GradientTransformation, config: Config) -> TrainState:
  """Makes the state before the first step. The EMA starts as a copy of the parameters."""
  average = None if config.optim.ema_decay is None else jax.tree.map(jnp.copy, (params, stats))
  zero = jnp.zeros((), jnp.int32)
  return TrainState(
    step=zero,
    params=params,
    stats=stats,
    opt_state=optimizer.init(params),
    ema=average,
    halted=jnp.zeros((), bool),
    loss_mean=jnp.zeros(()),
    bad_steps=zero,
    passed_over=zero,
  )


def state_shapes(params: nnx.State, stats: nnx.State, optimizer: optax.GradientTransformation, config: Config) -> TrainState:
  """Returns the shapes and dtypes of the state, from those of the parameters and statistics."""
  return jax.eval_shape(lambda params, stats: init_state(params, stats, optimizer, config), params, stats)


def first_state(
  params: nnx.State, stats: nnx.State, optimizer: optax.GradientTransformation, config: Config, like: TrainState
) -> TrainState:
  """Makes the state before the first step on the devices, placed as `like` says (`sharding.place`), from arrays on the host.

  One program makes all of it; operation by operation, every new shape would need a program of its own.
  """
  placed = sharding.put((params, stats), (like.params, like.stats))
  places = jax.tree.map(lambda x: x.sharding, like)
  return jax.jit(lambda params, stats: init_state(params, stats, optimizer, config), out_shardings=places)(*placed)
