"""How fast the compiled training step is: the loop's own step, on synthetic images that already lie on the devices.

    from nfnets.measure import step
    print(step.benchmark_step(config, steps=50, warmup=5))

What keeps the figures honest: every step takes the state that the one before it gave back (donated, as in training),
so none can be skipped or overlap; the clock stops only when the new state is there; warm-up steps are not counted;
nothing is sent to the devices meanwhile (a transfer guard sees to it); and the figures are handed out only if the last
loss is finite and the state has counted as many updates as were asked for.
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
from nfnets.train.step import sharding
from nfnets.train.step.gradients import Batch, Metrics, needs_all_rows
from nfnets.train.step.state import TrainState, build_network, init_state, split_network

# Blocks of steps with and without AGC; each pair gives one ratio.
AGC_PAIRS = 10


class OutOfMemoryError(UserError):
  """The step does not fit into the devices' memory; the message says what to lower."""


def benchmark_step(
  config: Config,
  *,
  steps: int = 50,
  warmup: int = 5,
  without_agc: bool = False,
  mesh: Mesh | None = None,
  say: Callable[[str], None] = lambda line: None,
) -> StepReport:
  """Times the training step that `config` describes.

  Read from `config`: everything that makes the step (model, optimizer, loss, batch). No dataset is loaded: images are
  noise of config.data.image_size pixels (None = the model's training resolution), labels are drawn from
  config.data.num_classes (None = 1000), and an epoch is as long as ImageNet's.

  Args:
    config: the run; `batch` is over all devices.
    steps: timed steps, first one by one, then as many in a row.
    warmup: steps before these, at least 1; the first of them shows whether the state is donated.
    without_agc: also time the step with clipping=None, in blocks that take turns with the configured step's. Both
      states then lie in memory, but the memory figures are from before the second is made.
    mesh: the devices; all of them by default.
    say: gets a line as each phase begins.

  Raises:
    UserError: a field or argument is out of range, the batch does not divide among the devices, `without_agc` where
      the config has no AGC; OutOfMemoryError where it does not fit; what `models.create` and `optim.make_optimizer`
      raise.
    FloatingPointError: the loss or a gradient was not finite, so the times would mean nothing.
  """
  config.validate()
  for name, value in (("steps", steps), ("warmup", warmup)):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise UserError(f"{name} = {value!r}: expected a whole number >= 1.")
  clips = config.optim.clipping is not None and config.optim.clipping < math.inf
  if without_agc and not clips:
    raise UserError(
      f"without_agc needs AGC to compare with, but config.optim.clipping={config.optim.clipping}; set it, e.g. to 0.01"
    )
  mesh = sharding.make_mesh() if mesh is None else mesh
  sharding.check_batch(config.batch, mesh, config.accumulate)
  overrides = config.model.all_overrides()
  size = config.data.image_size or models.variant(config.model.name, **overrides).train_resolution
  classes = config.data.num_classes or 1000
  where = f"{mesh.size} × {mesh.devices.flat[0].device_kind}"
  with _explained_out_of_memory(config.batch, size, where):
    say(f"initialising {config.model.name} on {where}")
    begin = time.perf_counter()
    network = build_network(config.model, classes, seed=config.seed)
    graph, params, stats = split_network(network)
    state = _state(config, params, stats, mesh)
    init_s = time.perf_counter() - begin
    del network, params, stats  # the state's buffers are about to be donated
    say(f"compiling the step on {config.batch} images of {size}×{size}")
    plain_images = dataclasses.replace(config, data=dataclasses.replace(config.data, mix="none"))  # nothing is mixed here
    lowered, lowering_s = _timed(program.lower, plain_images, graph, state, mesh, size)
    compiled, compile_s = _timed(lowered.compile)
    batch = _batch(config, mesh, size, classes)

    say(f"{warmup} steps to warm up, {steps} one by one, {steps} in a row")
    peak_before = _peak_bytes(mesh)
    run = _Run(step=compiled, state=state, batch=batch)
    before = jax.tree.leaves(state)
    del state
    state_bytes = sum(leaf.nbytes for leaf in before)
    run.seconds_per_step(1)
    donated_bytes = sum(leaf.nbytes for leaf in before if leaf.is_deleted())
    del before
    if warmup > 1:
      run.seconds_per_step(warmup - 1)
    waited = Spread.of([1e3 * run.seconds_per_step(1) for _ in range(steps)])
    run_s = run.seconds_per_step(steps)
    memory = _memory(compiled, peak_before, _peak_bytes(mesh))
    run.check()  # before the comparison, which would only waste time on a halted state

    overhead = None
    if without_agc:
      say("compiling the step without AGC, then blocks of both in turn")
      plain_config = dataclasses.replace(plain_images, optim=dataclasses.replace(config.optim, clipping=None))
      plain_state = _state(plain_config, *jax.tree.map(jnp.copy, (run.state.params, run.state.stats)), mesh)
      plain = _Run(step=program.lower(plain_config, graph, plain_state, mesh, size).compile(), state=plain_state, batch=batch)
      del plain_state
      overhead = _compare(run, plain, warmup=warmup, steps=max(1, round(steps / AGC_PAIRS)))
      plain.check()
    loss = run.check()

  macs = models.describe(config.model.name, classes, resolutions={"train": size}, **overrides).macs[size]
  images_per_s = config.batch / run_s
  tflops = 6 * macs * images_per_s / mesh.size / 1e12
  kind = mesh.devices.flat[0].device_kind
  peak = peak_tflops(kind)
  # XLA counts a device's share of the batch; of the lowered program the whole, where it was left to divide the computation.
  share = config.batch / mesh.size
  xla_flops = _flops_an_image(lowered, config.batch if needs_all_rows(config, run.state.stats) else share)
  xla_optimised = _flops_an_image(compiled, share)
  return StepReport(
    model=config.model.name,
    overrides=overrides,
    dtype=config.model.dtype,
    num_classes=classes,
    image_size=size,
    parameters=sum(leaf.size for leaf in jax.tree.leaves(run.state.params)),
    batch=config.batch,
    optimizer=config.optim.name,
    clipping=config.optim.clipping if clips else None,
    agc_track=clips and config.optim.agc_track,
    ema_decay=config.optim.ema_decay,
    device_kind=kind,
    devices=mesh.size,
    processes=jax.process_count(),
    versions={**program.versions(), "backend": " ".join(mesh.devices.flat[0].client.platform_version.split())},
    xla_flags=os.environ.get("XLA_FLAGS", ""),
    compilation_cache=jax.config.jax_compilation_cache_dir,
    date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    init_s=init_s,
    lowering_s=lowering_s,
    compile_s=compile_s,
    warmup_steps=warmup,
    waited_step_ms=waited,
    run_steps=steps,
    run_step_ms=1e3 * run_s,
    images_per_s=images_per_s,
    images_per_s_per_device=images_per_s / mesh.size,
    forward_macs_per_image=macs,
    flops_per_image=6 * macs,
    xla_flops_per_image=xla_flops,
    xla_optimised_flops_per_image=xla_optimised,
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


@dataclasses.dataclass(slots=True, kw_only=True)
class _Run:
  """A compiled step with its own state, going on from call to call."""

  step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
  state: TrainState
  batch: Batch
  metrics: Metrics | None = None
  done: int = 0

  def seconds_per_step(self, steps: int) -> float:
    """Sends `steps` steps one after the other without waiting, then waits for the last state; mean seconds a step."""
    with jax.transfer_guard("disallow"):
      begin = time.perf_counter()
      for _ in range(steps):
        self.state, self.metrics = self.step(self.state, self.batch)
      jax.block_until_ready((self.state, self.metrics))
      seconds = time.perf_counter() - begin
    self.done += steps
    return seconds / steps

  def check(self) -> float:
    """The last step's mean loss; FloatingPointError if the run stood still instead of training."""
    loss = float(self.metrics["loss_sum"]) / float(self.metrics["count"])
    if bool(self.state.halted) or not math.isfinite(loss):
      raise FloatingPointError(
        f"loss or gradient not finite at step {int(self.state.step) + 1} of the benchmark (loss "
        f"{loss:g}): the time of a halted step means nothing; lower config.optim.base_lr"
      )
    if int(self.state.step) != self.done:
      raise RuntimeError(f"the state counts {int(self.state.step)} updates, but {self.done} steps were timed")
    return loss


def _compare(run: _Run, plain: _Run, *, warmup: int, steps: int) -> AgcOverhead:
  """AGC_PAIRS pairs of blocks; who goes first alternates, so that a drift of the clock favours neither."""
  for each in (run, plain):
    each.seconds_per_step(warmup)
  milliseconds: dict[int, list[float]] = {id(run): [], id(plain): []}
  for pair in range(AGC_PAIRS):
    for each in (run, plain) if pair % 2 == 0 else (plain, run):
      milliseconds[id(each)].append(1e3 * each.seconds_per_step(steps))
  with_agc, without_agc = milliseconds.values()
  first, second = Spread.of(with_agc), Spread.of(without_agc)
  pair_ratio = Spread.of([a / b for a, b in zip(with_agc, without_agc, strict=True)])
  return AgcOverhead(
    with_agc_ms=first, without_agc_ms=second, ratio=first.median / second.median, pair_ratio=pair_ratio, steps_per_block=steps
  )


def _state(config: Config, params: nnx.State, stats: nnx.State, mesh: Mesh) -> TrainState:
  """The state before the first step, once it lies on the devices."""
  state = init_state(params, stats, program.make_optimizer(config, params), config)
  return jax.block_until_ready(sharding.put(state, sharding.place(mesh, state, shard=config.shard)))


def _batch(config: Config, mesh: Mesh, size: int, classes: int) -> Batch:
  """Noise, not zeros: a chip draws less power on zeros, and so runs faster than on images."""
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
  """(what `work` returns, seconds)."""
  begin = time.perf_counter()
  return work(*args), time.perf_counter() - begin


def _peak_bytes(mesh: Mesh) -> int | None:
  """The most bytes that were ever in use on one of this process's devices; None where the backend does not say."""
  peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in mesh.local_devices]
  return None if None in peaks else max(peaks)


def _memory(compiled: jax.stages.Compiled, peak_before: int | None, peak: int | None) -> Memory:
  planned = program.memory(compiled)
  names = ("arguments", "outputs", "aliased", "temporaries")
  sizes = {name: None if planned is None else getattr(planned, name) for name in names}
  return Memory(**sizes, program=None if planned is None else planned.data, peak_before=peak_before, peak=peak)


def _flops_an_image(compiled: jax.stages.Lowered | jax.stages.Compiled, images: float) -> float | None:
  flops = program.cost(compiled, "flops")
  return None if flops is None else flops / images


@contextlib.contextmanager
def _explained_out_of_memory(batch: int, size: int, where: str) -> Iterator[None]:
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not program.is_out_of_memory(error):
      raise
    raise OutOfMemoryError(
      f"out of memory with {batch} images of {size}×{size} a step on {where}; lower the batch or "
      "the image size, or set config.model.remat=True"
    ) from error
