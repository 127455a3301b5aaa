"""Times the training loop's own compiled step, on synthetic images that already lie on the devices.

    from nfnets.measure import step
    print(step.benchmark_step(config, steps=50, warmup=5))

What keeps the figures honest: every step takes the state that the step before it returned (donated, as in training), so no step
can be skipped or overlap another; the clock stops only when the new state is computed; warm-up steps are not counted; a transfer
guard forbids sending anything to the devices meanwhile; and there is a report only if the last loss is finite and the state has
counted as many updates as steps were run.
"""

import dataclasses
import datetime
import math
import os
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from nfnets import models
from nfnets.config import Config
from nfnets.errors import UserError
from nfnets.measure import program
from nfnets.measure.chips import peak_tflops
from nfnets.measure.runs import AGC_PAIRS, Prepared, agc_overhead, explained_out_of_memory, first_step, prepare
from nfnets.measure.step_report import AgcOverhead, Memory, Spread, StepReport
from nfnets.train.logs import profile as tracing
from nfnets.train.step import sharding
from nfnets.train.step.gradients import needs_all_rows


def benchmark_step(
  config: Config,
  *,
  steps: int = 50,
  warmup: int = 5,
  without_agc: bool = False,
  profile: str | None = None,
  mesh: Mesh | None = None,
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
    profile: a directory for a trace of `tracing.TRACED` further steps, after the timed ones; `say` gets its table.
    mesh: the devices; all of them by default.
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
  size = config.data.image_size or models.variant(config.model.name, **config.model.all_overrides()).train_resolution
  classes, source = program.class_count(config)
  say(f"{classes} classes, {source}")
  setup = _Setup(config=config, mesh=mesh, size=size, classes=classes)
  with explained_out_of_memory(config.batch, size, setup.devices):
    say(f"initialising {config.model.name} on {setup.devices}, compiling the step on {config.batch} images of {size}×{size}")
    built = prepare(config, mesh, size, classes)
    measured = _measure(setup, built, steps=steps, warmup=warmup, without_agc=without_agc, profile=profile, say=say)
  return _report(setup, built, measured)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Setup:
  """Holds what is measured: the run, its devices, the side of its images in pixels, and its number of classes."""

  config: Config
  mesh: Mesh
  size: int
  classes: int

  @property
  def kind(self) -> str:
    return self.mesh.devices.flat[0].device_kind

  @property
  def devices(self) -> str:
    return f"{self.mesh.size} × {self.kind}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
  """Holds what was measured; the fields are those of StepReport. run_s: seconds of a step in a run."""

  waited: Spread
  run_s: float
  warmup: int
  steps: int
  memory: Memory
  state_bytes: int
  donated_bytes: int
  overhead: AgcOverhead | None
  loss: float


def _measure(
  setup: _Setup, built: Prepared, *, steps: int, warmup: int, without_agc: bool, profile: str | None, say: Callable[[str], None]
) -> _Measured:
  """Times the step, alone and in a run, and beside the same step without AGC where that is asked for."""
  run, mesh = built.run, setup.mesh
  say(f"{warmup} steps to warm up, {steps} one by one, {steps} in a row")
  peak_before = _peak_bytes(mesh)
  state_bytes, donated_bytes = first_step(run)
  if warmup > 1:
    run.seconds_per_step(warmup - 1)
  waited = Spread.of([1e3 * run.seconds_per_step(1) for _ in range(steps)])
  run_s = run.seconds_per_step(steps)
  memory = Memory(compiled=program.memory(built.compiled), peak_before=peak_before, peak=_peak_bytes(mesh))
  run.check()  # before the comparison, which would only waste time on a halted state
  overhead = None
  if without_agc:
    say("compiling the step without AGC, then blocks of both in turn")
    block = max(1, round(steps / AGC_PAIRS))
    overhead = agc_overhead(built.config, built.graph, run, mesh, setup.size, warmup=warmup, steps=block)
  if profile is not None:
    with tracing.trace(profile):
      run.seconds_per_step(tracing.TRACED)
    say(tracing.table(tracing.newest(profile), tracing.TRACED))
  return _Measured(
    waited=waited,
    run_s=run_s,
    warmup=warmup,
    steps=steps,
    memory=memory,
    state_bytes=state_bytes,
    donated_bytes=donated_bytes,
    overhead=overhead,
    loss=run.check(),
  )


def _report(setup: _Setup, built: Prepared, measured: _Measured) -> StepReport:
  """Puts the figures together."""
  config, mesh, run = setup.config, setup.mesh, built.run
  overrides = config.model.all_overrides()
  macs = models.describe(config.model.name, setup.classes, resolutions={"train": setup.size}, **overrides).macs[setup.size]
  images_per_s = config.batch / measured.run_s
  tflops, peak = 6 * macs * images_per_s / mesh.size / 1e12, peak_tflops(setup.kind)
  # XLA counts a device's share of the batch; the lowered program is of the whole batch where XLA divides the computation itself
  share = config.batch / mesh.size
  lowered_images = config.batch if needs_all_rows(config, run.state.stats) else share
  return StepReport(
    model=config.model.name,
    overrides=overrides,
    dtype=config.model.dtype,
    num_classes=setup.classes,
    image_size=setup.size,
    parameters=sum(leaf.size for leaf in jax.tree.leaves(run.state.params)),
    batch=config.batch,
    optimizer=config.optim.name,
    clipping=config.optim.clipping if _clips(config) else None,
    agc_track=_clips(config) and config.optim.agc_track,
    ema_decay=config.optim.ema_decay,
    device_kind=setup.kind,
    devices=mesh.size,
    processes=jax.process_count(),
    versions={**program.versions(), "backend": " ".join(mesh.devices.flat[0].client.platform_version.split())},
    xla_flags=os.environ.get("XLA_FLAGS", ""),
    glibc_tunables=os.environ.get("GLIBC_TUNABLES", ""),
    compilation_cache=program.compilation_cache(),
    date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    init_s=built.init_s,
    lowering_s=built.lowering_s,
    compile_s=built.compile_s,
    warmup_steps=measured.warmup,
    waited_step_ms=measured.waited,
    run_steps=measured.steps,
    run_step_ms=1e3 * measured.run_s,
    images_per_s=images_per_s,
    images_per_s_per_device=images_per_s / mesh.size,
    forward_macs_per_image=macs,
    flops_per_image=6 * macs,
    xla_flops_per_image=_flops_an_image(built.lowered, lowered_images),
    xla_optimised_flops_per_image=_flops_an_image(built.compiled, share),
    tflops_per_device=tflops,
    peak_tflops_per_device=peak,
    mfu=None if peak is None else tflops / peak,
    memory=measured.memory,
    state_bytes=measured.state_bytes,
    donated_bytes=measured.donated_bytes,
    final_loss=measured.loss,
    updates=run.done,
    agc=measured.overhead,
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


def _peak_bytes(mesh: Mesh) -> int | None:
  """Returns the most bytes that were ever in use on one of this process's devices; None where the backend does not report it."""
  peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in mesh.local_devices]
  reported = [peak for peak in peaks if peak is not None]
  return max(reported) if len(reported) == len(peaks) else None


def _flops_an_image(step: jax.stages.Lowered | jax.stages.Compiled, images: float) -> float | None:
  """Divides XLA's count of the step's FLOPs by the `images` that it counts."""
  flops = program.cost(step, "flops")
  return None if flops is None else flops / images
