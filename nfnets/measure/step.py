"""Times the training loop's own compiled step, on synthetic images that already lie on the devices.

    from nfnets.measure import step
    print(step.benchmark_step(config, steps=50, warmup=5))

What keeps the figures honest: every step takes the state that the step before it returned (donated, as in training), so no step
can be skipped or overlap another; the clock stops only when the new state is computed; warm-up steps are not counted; a transfer
guard forbids sending anything to the devices meanwhile; and there is a report only if the last loss is finite and the state has
counted as many updates as steps were run.
"""

import contextlib
import dataclasses
import datetime
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from nfnets import models
from nfnets.config import Config
from nfnets.errors import UserError
from nfnets.measure import program
from nfnets.measure.chips import peak_tflops
from nfnets.measure.step_report import AgcOverhead, Memory, Spread, StepReport
from nfnets.train.logs import profile as tracing
from nfnets.train.step import sharding
from nfnets.train.step.gradients import Batch, Metrics, needs_all_rows
from nfnets.train.step.state import TrainState, build_network, init_state, split_network

AGC_PAIRS = 10  # pairs of blocks of steps, one with and one without AGC; each pair gives one ratio


class OutOfMemoryError(UserError):
  """The step does not fit into the devices' memory; the message names the settings to lower."""


def benchmark_step(
  config: Config,
  *,
  steps: int = 50,
  warmup: int = 5,
  without_agc: bool = False,
  mesh: Mesh | None = None,
  profile: str | None = None,
  say: Callable[[str], None] = lambda line: None,
) -> StepReport:
  """Times the training step that `config` describes.

  Read from `config`: everything that makes the step (model, optimizer, loss, batch). No dataset is loaded: images are
  noise of config.data.image_size pixels (None = the model's training resolution), labels are drawn from as many classes as
  `program.class_count` says, and an epoch is as long as ImageNet's.

  Args:
    config: the run; `batch` is over all devices.
    steps: timed steps, first one by one, then as many in a row.
    warmup: steps before these, at least 1; the first of them shows whether the state is donated.
    without_agc: also time the step with clipping=None, in blocks that alternate with the configured step's. Both states then
      lie in memory, but the memory figures are taken before the second is made.
    mesh: the devices; all of them by default.
    profile: a directory for a trace of `tracing.TRACED` further steps, after the timed ones; `say` gets its table.
    say: gets a line as each phase begins.

  Raises:
    UserError: a field or argument is out of range, the batch does not divide among the devices, or `without_agc` is set where
      the config has no AGC; also what `models.create` and `optim.make_optimizer` raise.
    OutOfMemoryError: the step does not fit into the devices' memory.
    FloatingPointError: the loss or a gradient was not finite, so the times would mean nothing.
  """
  _check_arguments(config, steps, warmup, without_agc)
  mesh = sharding.make_mesh() if mesh is None else mesh
  sharding.check_batch(config.batch, mesh, config.accumulate)
  overrides = config.model.all_overrides()
  size = config.data.image_size or models.variant(config.model.name, **overrides).train_resolution
  classes, source = program.class_count(config)
  say(f"{classes} classes, {source}")
  kind = mesh.devices.flat[0].device_kind
  devices = f"{mesh.size} × {kind}"
  with explained_out_of_memory(config.batch, size, devices):
    say(f"initialising {config.model.name} on {devices}, compiling the step on {config.batch} images of {size}×{size}")
    ready = prepare(config, mesh, size, classes)
    run, plain_images = ready.run, ready.config
    say(f"{warmup} steps to warm up, {steps} one by one, {steps} in a row")
    peak_before = _peak_bytes(mesh)
    state_bytes, donated_bytes = _first_step(run)
    if warmup > 1:
      run.seconds_per_step(warmup - 1)
    waited = Spread.of([1e3 * run.seconds_per_step(1) for _ in range(steps)])
    run_s = run.seconds_per_step(steps)
    memory = Memory(compiled=program.memory(ready.compiled), peak_before=peak_before, peak=_peak_bytes(mesh))
    run.check()  # before the comparison, which would only waste time on a halted state
    overhead = None
    if without_agc:
      say("compiling the step without AGC, then blocks of both in turn")
      overhead = _agc_overhead(plain_images, ready.graph, run, mesh, size, warmup=warmup, steps=max(1, round(steps / AGC_PAIRS)))
    if profile is not None:
      with tracing.trace(profile):
        run.seconds_per_step(tracing.TRACED)
      say(tracing.table(tracing.newest(profile), tracing.TRACED))
    loss = run.check()

  macs = models.describe(config.model.name, classes, resolutions={"train": size}, **overrides).macs[size]
  images_per_s = config.batch / run_s
  tflops = 6 * macs * images_per_s / mesh.size / 1e12
  peak = peak_tflops(kind)
  # XLA counts a device's share of the batch; the lowered program is of the whole batch where XLA divides the computation itself
  share = config.batch / mesh.size
  lowered_images = config.batch if needs_all_rows(config, run.state.stats) else share
  return StepReport(
    model=config.model.name,
    overrides=overrides,
    dtype=config.model.dtype,
    num_classes=classes,
    image_size=size,
    parameters=sum(leaf.size for leaf in jax.tree.leaves(run.state.params)),
    batch=config.batch,
    optimizer=config.optim.name,
    clipping=config.optim.clipping if _clips(config) else None,
    agc_track=_clips(config) and config.optim.agc_track,
    ema_decay=config.optim.ema_decay,
    device_kind=kind,
    devices=mesh.size,
    processes=jax.process_count(),
    versions={**program.versions(), "backend": " ".join(mesh.devices.flat[0].client.platform_version.split())},
    xla_flags=os.environ.get("XLA_FLAGS", ""),
    compilation_cache=program.compilation_cache(),
    date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    init_s=ready.init_s,
    lowering_s=ready.lowering_s,
    compile_s=ready.compile_s,
    warmup_steps=warmup,
    waited_step_ms=waited,
    run_steps=steps,
    run_step_ms=1e3 * run_s,
    images_per_s=images_per_s,
    images_per_s_per_device=images_per_s / mesh.size,
    forward_macs_per_image=macs,
    flops_per_image=6 * macs,
    xla_flops_per_image=_flops_an_image(ready.lowered, lowered_images),
    xla_optimised_flops_per_image=_flops_an_image(ready.compiled, share),
    tflops_per_device=tflops,
    peak_tflops_per_device=peak,
    mfu=None if peak is None else tflops / peak,
    memory=memory,
    state_bytes=state_bytes,
    donated_bytes=donated_bytes,
    final_loss=loss,
    updates=run.done,
    agc=overhead,
  )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
  """The compiled step, ready to run, and the seconds that each part of preparing it took."""

  config: Config  # as given, but without mixing of images, which noise does not need
  graph: nnx.GraphDef
  run: "StepRun"
  lowered: jax.stages.Lowered
  compiled: jax.stages.Compiled
  init_s: float
  lowering_s: float
  compile_s: float


def prepare(config: Config, mesh: Mesh, size: int, classes: int) -> Prepared:
  """Makes the state, compiles the step for images of `size` pixels a side, and puts a batch of noise on the devices."""
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, mix="none"))
  (graph, state), init_s = _timed(_initial_state, config, classes, mesh)
  lowered, lowering_s = _timed(program.lower, config, graph, state, mesh, size)
  compiled, compile_s = _timed(lowered.compile)
  return Prepared(
    config=config,
    graph=graph,
    run=StepRun(step=compiled, state=state, batch=_batch(config, mesh, size, classes)),
    lowered=lowered,
    compiled=compiled,
    init_s=init_s,
    lowering_s=lowering_s,
    compile_s=compile_s,
  )


def _check_arguments(config: Config, steps: int, warmup: int, without_agc: bool) -> None:
  """Raises UserError for a wrong config, for numbers of steps out of range, and for a comparison with AGC where there is none."""
  config.validate()
  for name, value in (("steps", steps), ("warmup", warmup)):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise UserError(f"{name} = {value!r}: expected a whole number >= 1.")
  if without_agc and not _clips(config):
    raise UserError(
      f"without_agc needs AGC to compare with, but config.optim.clipping={config.optim.clipping}; set it, e.g. to 0.01"
    )


def _clips(config: Config) -> bool:
  """Says whether the step has AGC; a lambda of inf clips nothing."""
  return config.optim.clipping is not None and config.optim.clipping < math.inf


@dataclasses.dataclass(slots=True, kw_only=True)
class StepRun:
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


def _initial_state(config: Config, classes: int, mesh: Mesh) -> tuple[nnx.GraphDef, TrainState]:
  """Builds the network, and the state before the first step."""
  graph, params, stats = split_network(build_network(config.model, classes, seed=config.seed))
  return graph, _state(config, params, stats, mesh)


def _first_step(run: StepRun) -> tuple[int, int]:
  """Runs the first step: (bytes of the state, how many of them the step took over)."""
  leaves = jax.tree.leaves(run.state)
  state_bytes = sum(leaf.nbytes for leaf in leaves)
  run.seconds_per_step(1)
  return state_bytes, sum(leaf.nbytes for leaf in leaves if leaf.is_deleted())


def _agc_overhead(
  config: Config, graph: nnx.GraphDef, run: StepRun, mesh: Mesh, size: int, *, warmup: int, steps: int
) -> AgcOverhead:
  """Compiles the step of `config` without AGC, and times it in turn with `run`, from a copy of its parameters."""
  plain_config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, clipping=None))
  params, stats = jax.tree.map(jnp.copy, run.state.params), jax.tree.map(jnp.copy, run.state.stats)
  state = _state(plain_config, params, stats, mesh)
  del params, stats
  plain = StepRun(step=program.lower(plain_config, graph, state, mesh, size).compile(), state=state, batch=run.batch)
  del state
  overhead = _compare(run, plain, warmup=warmup, steps=steps)
  plain.check()
  return overhead


def _compare(run: StepRun, plain: StepRun, *, warmup: int, steps: int) -> AgcOverhead:
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
  state = init_state(params, stats, program.make_optimizer(config, params), config)
  return jax.block_until_ready(sharding.put(state, sharding.place(mesh, state, shard=config.shard)))


def _batch(config: Config, mesh: Mesh, size: int, classes: int) -> Batch:
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


def _peak_bytes(mesh: Mesh) -> int | None:
  """Returns the most bytes that were ever in use on one of this process's devices; None where the backend does not report it."""
  peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in mesh.local_devices]
  reported = [peak for peak in peaks if peak is not None]
  return max(reported) if len(reported) == len(peaks) else None


def _flops_an_image(step: jax.stages.Lowered | jax.stages.Compiled, images: float) -> float | None:
  """Divides XLA's count of the step's FLOPs by the `images` that it counts."""
  flops = program.cost(step, "flops")
  return None if flops is None else flops / images


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
