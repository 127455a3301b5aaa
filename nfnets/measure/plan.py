"""Compiles the real training step, also for absent devices, and reports the memory, arithmetic, traffic and time that it takes.

    from nfnets.measure import plan
    print(plan.make_plan(config, topology="v5e:16x16").advice)

Parameters and batches are shapes only: nothing is computed but the program. For TPUs libtpu compiles, which needs no TPU; for
GPUs and CPUs the local compiler does, so only on a machine that has them.
"""

import contextlib
import dataclasses
import datetime
import difflib
import importlib.util
import os
import re
import threading
import time
from collections.abc import Callable, Iterator

import jax
from flax import nnx
from jax.sharding import Mesh

from nfnets import models
from nfnets.config import Config
from nfnets.errors import UserError
from nfnets.measure import hlo, plan_report, program, traffic
from nfnets.measure.chips import Chip, chip
from nfnets.train import resolve
from nfnets.train.step import sharding
from nfnets.train.step.state import build_network, split_for_training, state_shapes

# The slices that can be rented. libtpu also accepts other slices of the same kinds, if they consist of whole hosts.
_FLAT, _CUBES = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16".split(), "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16".split()
TOPOLOGIES = (
  *(f"{kind}:{shape}" for kind in ("v5e", "v6e") for shape in _FLAT),
  *(f"{kind}:{shape}" for kind in ("v4", "v5p") for shape in _CUBES),
  "v2:2x2",
  "v3:2x2",
  "v3:4x4",
)
# Without these libtpu asks a metadata server about the machine, which does not matter for compiling.
_LIBTPU = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_STDERR_LOG_LEVEL": "3",
}
HEARTBEAT = 60.0  # seconds between two lines while a compiler works


class TopologyError(UserError):
  """The topology is not available; the message names those that are, or the package to install."""


def tpu_devices(topology: str) -> list[jax.Device]:
  """Returns the devices of a TPU slice such as "v5e:16x16", to compile for: one a chip (on v2 and v3 one a core, as in JAX).

  Raises:
    TopologyError: the topology is unknown, or libtpu is missing or does not fit this jax.
  """
  if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
    raise TopologyError(
      f"topology={topology!r} needs libtpu, the compiler for TPUs (no TPU needed): pip install 'jax[tpu]=={jax.__version__}'"
    )
  for name, value in _LIBTPU.items():
    os.environ.setdefault(name, value)
  try:
    from jax.experimental.topologies import get_topology_desc

    # on v4 and v5p the two cores of a chip are one device, as on real machines
    cores = {"chip_config_name": "megacore"} if topology.startswith(("v4:", "v5p:")) else {}
    return list(get_topology_desc(platform="tpu", topology_name=topology, **cores).devices)
  except (ImportError, RuntimeError, NotImplementedError) as error:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "INVALID_ARGUMENT" in reason:
      near = difflib.get_close_matches(topology.replace("-", ":"), TOPOLOGIES, n=4, cutoff=0.5)
      raise TopologyError(
        f"unknown topology {topology!r} ({reason.removeprefix('INVALID_ARGUMENT: ')}); known ones: "
        f"{', '.join(near or TOPOLOGIES[1::5])}"
      ) from error
    raise TopologyError(
      f"topology={topology!r}: jax {jax.__version__} cannot use the libtpu that is installed ({reason}); "
      f"pip install 'jax[tpu]=={jax.__version__}', or a newer jax"
    ) from error


def make_plan(
  config: Config,
  *,
  topology: str | None = None,
  advise: bool = False,
  mesh: Mesh | None = None,
  top: int = 0,
  say: Callable[[str], None] = lambda line: None,
) -> plan_report.Plan:
  """Compiles the step of `config` and, where it does not fit, variants of it until one does.

  Args:
    config: the run. Images have the size of the data section, or else the variant's; for the classes see `program.class_count`.
    topology: a TPU slice, see `tpu_devices`; None means the devices of `mesh`.
    advise: compile all variants (remat, shard and accumulate = 2, 4, 8, unless set already), whether the step fits or not.
    mesh: the devices, by default all of this machine.
    top: how many of each program's operations are kept, see `traffic.operations`.
    say: gets a line as each compilation begins and ends, and every minute between.

  Raises:
    TopologyError: the topology is not available.
    UserError: the config is wrong, or the devices cannot share its batch; also what `models.create` raises.
  """
  config.validate()
  mesh = mesh or sharding.make_mesh(None if topology is None else tpu_devices(topology))
  sharding.check_batch(config.batch, mesh, config.accumulate)
  device = mesh.devices.flat[0]
  row = chip(device.device_kind)
  size, (classes, source) = _image_size(config), program.class_count(config)
  say(f"{classes} classes, {source}")
  description = models.describe(config.model.name, classes, resolutions={"train": size}, **config.model.all_overrides())
  capacity = _capacity(device, None if row is None else row.memory)
  setup = _Setup(
    mesh=mesh, chip=row, image_size=size, num_classes=classes, macs=description.macs[size], capacity=capacity, top=top
  )
  steps = _compile_steps(config, setup, advise, say)
  capacity = next(filter(None, (_refused(step.refusal)[1] for step in steps)), capacity)
  return plan_report.Plan(
    model=config.model.name,
    dtype=config.model.dtype,
    parameters=description.parameters,
    num_classes=classes,
    image_size=size,
    batch=config.batch,
    accumulate=config.accumulate,
    shard=config.shard,
    remat=config.model.remat,
    scan=config.model.scan,
    topology=topology,
    device_kind=device.device_kind,
    devices=mesh.size,
    capacity=capacity,
    chip=row,
    versions=program.versions(*(["libtpu"] if device.platform == "tpu" else [])),
    compilation_cache=program.compilation_cache(),
    steps=steps,
    advice=plan_report.advice(steps),
    date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  )


def variants(config: Config, devices: int) -> Iterator[tuple[str, Config]]:
  """Yields (name, config) of one change each that takes less memory, the cheapest first; leaves out what is set already."""
  if not config.model.remat:
    yield "remat", dataclasses.replace(config, model=dataclasses.replace(config.model, remat=True))
  if not config.shard and devices > 1:
    yield "shard", dataclasses.replace(config, shard=True)
  for parts in (2, 4, 8):
    if parts > config.accumulate and config.batch % (devices * parts) == 0:
      yield f"accumulate={parts}", dataclasses.replace(config, accumulate=parts)


def _all_changes(changes: list[tuple[str, Config]]) -> tuple[str, Config]:
  """Combines all changes; of those of the same field, the last counts."""
  names = dict((name.partition("=")[0], name) for name, _ in changes)
  last = changes[-1][1]
  return ", ".join(names.values()), dataclasses.replace(
    last,
    shard=any(config.shard for _, config in changes),
    model=dataclasses.replace(last.model, remat=any(config.model.remat for _, config in changes)),
  )


def counted_flops(config: Config, macs: int, devices: int) -> float:
  """Computes the FLOPs of one device in a step from `macs`, the model's multiply-adds of a forward pass of one image.

  A multiply-add is 2 FLOPs. A step is three passes (forward, and backward as two), four with remat; SAM's ascent adds its share
  of the images.
  """
  passes = (4 if config.model.remat else 3) * (1 + (config.optim.sam_share if config.optim.sam_rho else 0))
  return 2 * macs * passes * config.batch / devices


def lower(config: Config, mesh: Mesh, size: int, classes: int) -> jax.stages.Lowered:
  """Lowers the training loop's own step for the platform of `mesh`, from the shapes of the state and the batch alone."""
  graph, params, stats = nnx.eval_shape(lambda: split_for_training(build_network(config.model, classes), config))
  optimizer = program.make_optimizer(config, params)
  return program.lower(config, graph, state_shapes(params, stats, optimizer, config), mesh, size)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Setup:
  """Holds what all compilations of a plan share.

  macs: multiply-adds of a forward pass of one image; capacity: bytes a device; top: how many operations are kept.
  """

  mesh: Mesh
  chip: Chip | None
  image_size: int
  num_classes: int
  macs: int
  capacity: int | None
  top: int


def _compile_steps(config: Config, setup: _Setup, advise: bool, say: Callable[[str], None]) -> list[plan_report.CompiledStep]:
  """Compiles the configured step and, if it does not fit or `advise` is set, variants of it; stops at a fit unless `advise`."""
  begin, steps = time.perf_counter(), []

  def attempt(name: str, changed: Config) -> plan_report.CompiledStep:
    say_for_step = lambda line: say(f"[{time.perf_counter() - begin:6.1f} s] {name}: {line}")
    step = _compile(name, changed, setup, say_for_step)
    fits = "may fit" if step.fits is None else "fits" if step.fits else "does not fit"
    say_for_step(
      f"{step.memory_text()} a device, {fits} ({step.lowering_s:.1f} s of tracing, {step.compile_s:.1f} s of compiling)"
    )
    steps.append(step)
    return step

  configured = attempt("as configured", config)
  if advise or configured.fits is False:
    changes = list(variants(config, setup.mesh.size))
    for name, changed in changes:
      if attempt(name, changed).fits and not advise:
        break
    if configured.fits is False and not any(step.fits for step in steps) and len(changes) > 1:
      attempt(*_all_changes(changes))
  return steps


def _compile(name: str, config: Config, setup: _Setup, say: Callable[[str], None]) -> plan_report.CompiledStep:
  """Compiles one step; where the compiler refuses it for lack of memory, its message stands in the result."""
  mesh = setup.mesh
  device = mesh.devices.flat[0]
  counted = counted_flops(config, setup.macs, mesh.size)
  say("tracing")
  begin = time.perf_counter()
  lowered = lower(config, mesh, setup.image_size, setup.num_classes)
  lowering_s = time.perf_counter() - begin
  say(f"compiling for {mesh.size} × {device.device_kind}" + (" (minutes)" if device.platform == "tpu" else ""))
  begin = time.perf_counter()
  try:
    with _heartbeat(say):
      compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if not program.is_out_of_memory(error):
      raise
    refusal = " ".join(str(error).removeprefix("RESOURCE_EXHAUSTED: ").partition("HLO module")[0].split())[:400]
    return plan_report.CompiledStep(
      name=name,
      accumulate=config.accumulate,
      memory=None,
      refusal=refusal,
      needed=_refused(refusal)[0],
      fits=False,
      lowering_s=lowering_s,
      compile_s=time.perf_counter() - begin,
      counted_flops=counted,
    )
  compile_s = time.perf_counter() - begin
  memory = program.memory(compiled)
  if device.platform == "tpu":
    fits = True  # its compiler refuses a program that does not fit
  else:
    fits = None if memory is None or setup.capacity is None else memory.total <= setup.capacity
  flops, moved = program.cost(compiled, "flops"), program.cost(compiled, "bytes accessed")
  text = compiled.as_text() or ""
  collectives, operations = hlo.parse(text, mesh.size), traffic.operations(text)
  sent = sum(collective.sent for collective in collectives)
  return plan_report.CompiledStep(
    name=name,
    accumulate=config.accumulate,
    memory=memory,
    fits=fits,
    lowering_s=lowering_s,
    compile_s=compile_s,
    flops=flops,
    counted_flops=counted,
    memory_bytes=moved,
    collectives=collectives,
    roofline=plan_report.roofline(
      setup.chip, flops=max(flops or 0, counted), memory_bytes=moved, sent=sent, loops=config.accumulate
    ),
    main_bytes=sum(operation.bytes for operation in operations) if "S(1)" in text else None,
    operations=operations if setup.top else [],
  )


def _refused(refusal: str) -> tuple[int | None, int | None]:
  """Reads (bytes needed, bytes a device has) from a refusal by libtpu.

  It holds "… (19.26G) exceeds available HBM (15.75G)" or "Used 20.1G of 15.75G hbm".
  """
  match = re.search(
    r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)|"
    r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm",
    refusal,
  )
  if match is None:
    return None, None
  amounts = [text for text in match.groups() if text is not None]
  needed, available = (round(float(number) * 2 ** (10 * (1 + "KMGT".index(unit)))) for number, unit in (amounts[:2], amounts[2:]))
  return needed, available


def _capacity(device: jax.Device, sold: float | None) -> int | None:
  """Returns a device's bytes for programs: its allocator's limit or, if the device is absent, `sold` GiB."""
  with contextlib.suppress(jax.errors.JaxRuntimeError, NotImplementedError, ValueError):  # absent devices have no allocator
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
      return int(limit)
  return None if sold is None else round(sold * plan_report.GIB)


def _image_size(config: Config) -> int:
  """Returns the pixels of a side: the data section's, or else the variant's training resolution."""
  variant = models.variant(config.model.name, **config.model.all_overrides())
  return resolve.data_config(config).image_size or variant.train_resolution


@contextlib.contextmanager
def _heartbeat(say: Callable[[str], None]) -> Iterator[None]:
  """Says every minute, from another thread, that the compiler still works, since compilers are silent."""
  done, begin = threading.Event(), time.perf_counter()

  def beat() -> None:
    while not done.wait(HEARTBEAT):
      say(f"still compiling, {(time.perf_counter() - begin) / 60:.0f} min")

  thread = threading.Thread(target=beat, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
