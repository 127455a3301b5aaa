"""Runs a compiled training step on noise and times it, by itself and beside the step without AGC."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from nfnets.config import Config
from nfnets.errors import UserError
from nfnets.measure import program
from nfnets.measure.step_report import AgcOverhead, Spread
from nfnets.train.step import sharding
from nfnets.train.step.gradients import Batch, Metrics
from nfnets.train.step.state import TrainState, build_network, first_state, split_for_training, state_shapes

AGC_PAIRS = 10  # pairs of blocks of steps, one with and one without AGC; each pair gives one ratio


class OutOfMemoryError(UserError):
  """The step does not fit into the devices' memory; the message names the settings to lower."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
  """The compiled step, ready to run, and the seconds that each part of preparing it took."""

  config: Config  # as given, but without mixing of images, which noise does not need
  graph: nnx.GraphDef
  run: "Run"
  lowered: jax.stages.Lowered
  compiled: jax.stages.Compiled
  init_s: float
  lowering_s: float
  compile_s: float


def prepare(
  config: Config, mesh: Mesh, size: int, classes: int, *, compiler_options: Mapping[str, Any] | None = None
) -> Prepared:
  """Makes the state, compiles the step for images of `size` pixels a side, and puts a batch of noise on the devices.

  `compiler_options` are XLA's, by name.
  """
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, mix="none"))
  (graph, state), init_s = _timed(initial_state, config, classes, mesh)
  lowered, lowering_s = _timed(program.lower, config, graph, state, mesh, size)
  compiled, compile_s = _timed(lambda: lowered.compile(dict(compiler_options or {})))
  run = Run(step=compiled, state=state, batch=noise_batch(config, mesh, size, classes))
  return Prepared(
    config=config,
    graph=graph,
    run=run,
    lowered=lowered,
    compiled=compiled,
    init_s=init_s,
    lowering_s=lowering_s,
    compile_s=compile_s,
  )


@dataclasses.dataclass(slots=True, kw_only=True)
class Run:
  """Runs a compiled step on its own state, which every call takes on. done: how many steps have run."""

  step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
  state: TrainState
  batch: Batch
  metrics: Metrics | None = None
  done: int = 0

  def seconds_per_step(self, steps: int) -> float:
    """Starts `steps` steps one after the other, waits for the last state, and returns the mean seconds of a step."""
    with jax.transfer_guard("disallow"):
      begin = time.perf_counter()
      for _ in range(steps):
        self.state, self.metrics = self.step(self.state, self.batch)
      jax.block_until_ready((self.state, self.metrics))
      seconds = time.perf_counter() - begin
    self.done += steps
    return seconds / steps

  def check(self) -> float:
    """Returns the last step's mean loss; FloatingPointError where the run halted instead of training."""
    if self.metrics is None:
      raise RuntimeError("no step has run yet")
    loss = float(self.metrics["loss_sum"]) / float(self.metrics["count"])
    if bool(self.state.halted) or not math.isfinite(loss):
      raise FloatingPointError(
        f"loss or gradient not finite at step {int(self.state.step) + 1} of the benchmark (loss "
        f"{loss:g}): the time of a halted step means nothing; lower config.optim.base_lr"
      )
    if int(self.state.step) != self.done:
      raise RuntimeError(f"the state counts {int(self.state.step)} updates, but {self.done} steps were timed")
    return loss


def initial_state(config: Config, classes: int, mesh: Mesh) -> tuple[nnx.GraphDef, TrainState]:
  """Builds the network, and the state before the first step."""
  graph, params, stats = split_for_training(build_network(config.model, classes, seed=config.seed), config)
  return graph, _state(config, params, stats, mesh)


def first_step(run: Run) -> tuple[int, int]:
  """Runs the first step: (bytes of the state, how many of them the step took over)."""
  leaves = jax.tree.leaves(run.state)
  state_bytes = sum(leaf.nbytes for leaf in leaves)
  run.seconds_per_step(1)
  return state_bytes, sum(leaf.nbytes for leaf in leaves if leaf.is_deleted())


def agc_overhead(config: Config, graph: nnx.GraphDef, run: Run, mesh: Mesh, size: int, *, warmup: int, steps: int) -> AgcOverhead:
  """Compiles the step of `config` without AGC, and times it in turn with `run`, from a copy of its parameters."""
  plain_config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, clipping=None))
  params, stats = jax.tree.map(jnp.copy, run.state.params), jax.tree.map(jnp.copy, run.state.stats)
  state = _state(plain_config, params, stats, mesh)
  del params, stats
  plain = Run(step=program.lower(plain_config, graph, state, mesh, size).compile(), state=state, batch=run.batch)
  del state
  overhead = _compare(run, plain, warmup=warmup, steps=steps)
  plain.check()
  return overhead


def _compare(run: Run, plain: Run, *, warmup: int, steps: int) -> AgcOverhead:
  """Times AGC_PAIRS pairs of blocks, whose order alternates, so that a drift of the clock favours neither."""
  run.seconds_per_step(warmup)
  plain.seconds_per_step(warmup)
  with_agc, without_agc = [], []
  for pair in range(AGC_PAIRS):
    blocks = [(run, with_agc), (plain, without_agc)]
    for timed, milliseconds in blocks if pair % 2 == 0 else reversed(blocks):
      milliseconds.append(1e3 * timed.seconds_per_step(steps))
  first, second = Spread.of(with_agc), Spread.of(without_agc)
  pair_ratio = Spread.of([a / b for a, b in zip(with_agc, without_agc, strict=True)])
  return AgcOverhead(
    with_agc_ms=first, without_agc_ms=second, ratio=first.median / second.median, pair_ratio=pair_ratio, steps_per_block=steps
  )


def _state(config: Config, params: nnx.State, stats: nnx.State, mesh: Mesh) -> TrainState:
  """Makes the state before the first step, and waits until it lies on the devices."""
  optimizer = program.make_optimizer(config, params)
  like = sharding.place(mesh, state_shapes(params, stats, optimizer, config), shard=config.shard)
  return jax.block_until_ready(first_state(params, stats, optimizer, config, like))


def noise_batch(config: Config, mesh: Mesh, size: int, classes: int) -> Batch:
  """Makes a batch of noise: on zeros a chip draws less power, and so runs faster than on images."""
  draw = np.random.default_rng(config.seed)
  return jax.block_until_ready(
    sharding.put_batch(
      mesh,
      {
        "image": draw.integers(0, 256, (config.batch, size, size, 3), np.uint8),
        "label": draw.integers(0, classes, config.batch).astype(np.int32),
      },
    )
  )


def _timed(work: Callable[..., Any], *args: Any) -> tuple[Any, float]:
  """Calls `work`: (its result, seconds)."""
  begin = time.perf_counter()
  return work(*args), time.perf_counter() - begin


@contextlib.contextmanager
def explained_out_of_memory(batch: int, size: int, devices: str) -> Iterator[None]:
  """Turns a device's lack of memory into an OutOfMemoryError."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not program.is_out_of_memory(error):
      raise
    raise OutOfMemoryError(
      f"out of memory with {batch} images of {size}×{size} a step on {devices}; lower the batch or "
      "the image size, or set config.model.remat=True"
    ) from error
