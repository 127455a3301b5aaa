"""Compiles the real training step for devices that need not be there, and says what it takes: memory, arithmetic, traffic, time.

    from nfnets.train import plan
    print(plan.advice(plan.make_plan(config, topology="v5e:16x16").steps))

Parameters and batches are shapes all along, nothing is computed but the program. TPUs are compiled for by libtpu, which need not
find one; GPUs and CPUs by the local compiler, so only where they are.
"""

import contextlib
import dataclasses
import datetime
import difflib
import importlib.metadata
import importlib.util
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from nfnets import models, optim
from nfnets.config import Config
from nfnets.errors import UserError
from nfnets.measure import hlo, plan_report, step
from nfnets.measure.chips import chip
from nfnets.train import resolve
from nfnets.train.step import sharding
from nfnets.train.step.state import build_network, init_state, split_network
from nfnets.train.step.step import train_step_over

# Slices that can be rented; libtpu takes others of the same kinds too, as long as whole hosts make them up.
_FLAT, _CUBES = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16".split(), "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16".split()
TOPOLOGIES = (
  *(f"{kind}:{shape}" for kind in ("v5e", "v6e") for shape in _FLAT),
  *(f"{kind}:{shape}" for kind in ("v4", "v5p") for shape in _CUBES),
  "v2:2x2",
  "v3:2x2",
  "v3:4x4",
)
# libtpu asks a metadata server what machine this is, unless it is told; none of it matters for compiling.
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
  """The topology cannot be had; the message says which can, or what to install."""


def tpu_devices(topology: str) -> list[jax.Device]:
  """The devices of a TPU slice such as "v5e:16x16", to compile for; one a chip (v2, v3: one a core, as JAX has them).

  Raises TopologyError for an unknown one, and where libtpu is missing or does not go with this jax.
  """
  if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
    raise TopologyError(
      f"topology={topology!r} needs libtpu, the compiler for TPUs (no TPU needed): pip install 'jax[tpu]=={jax.__version__}'"
    )
  for name, value in _LIBTPU.items():
    os.environ.setdefault(name, value)
  try:
    from jax.experimental.topologies import get_topology_desc

    # v4 and v5p join the two cores of a chip to one device, as they do on machines
    cores = {"chip_config_name": "megacore"} if topology.startswith(("v4:", "v5p:")) else {}
    return list(get_topology_desc(platform="tpu", topology_name=topology, **cores).devices)
  except (ImportError, RuntimeError, NotImplementedError) as error:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "INVALID_ARGUMENT" in first:
      near = difflib.get_close_matches(topology.replace("-", ":"), TOPOLOGIES, n=4, cutoff=0.5)
      raise TopologyError(
        f"unknown topology {topology!r} ({first.removeprefix('INVALID_ARGUMENT: ')}); known ones: "
        f"{', '.join(near or TOPOLOGIES[1::5])}"
      ) from error
    raise TopologyError(
      f"topology={topology!r}: jax {jax.__version__} cannot use the libtpu that is installed ({first}); "
      f"pip install 'jax[tpu]=={jax.__version__}', or a newer jax"
    ) from error


def make_plan(
  config: Config,
  *,
  topology: str | None = None,
  advise: bool = False,
  mesh: Mesh | None = None,
  say: Callable[[str], None] = lambda line: None,
) -> plan_report.Plan:
  """Compiles the step of `config` and, where it does not fit, variants of it until one does.

  Args:
    config: the run; images are as large, classes as many as the data section says or else the variant and ImageNet.
    topology: a TPU slice, see `tpu_devices`; None = the devices of `mesh`, by default all of this machine.
    advise: compile the variants remat, shard and accumulate = 2, 4, 8 (what of them is not set already) whether it fits or not.
    say: gets a line as each compilation begins and ends, and every minute between.

  Raises:
    TopologyError; UserError where the config is wrong, or the devices cannot share its batch; what `models.create` raises.
  """
  config.validate()
  mesh = mesh or sharding.make_mesh(None if topology is None else tpu_devices(topology))
  sharding.check_batch(config.batch, mesh, config.accumulate)
  device = mesh.devices.flat[0]
  row = chip(device.device_kind)
  capacity = _capacity(device, None if row is None else row.memory)
  size, classes = _image_size(config), config.data.num_classes or 1000
  described = models.describe(config.model.name, classes, resolutions={"train": size}, **config.model.all_overrides())
  macs = described.macs[size]
  begin, compiled = time.perf_counter(), []

  def attempt(name: str, changed: Config) -> plan_report.CompiledStep:
    said = lambda line: say(f"[{time.perf_counter() - begin:6.1f} s] {name}: {line}")
    step = _compile(name, changed, mesh, size, classes, macs, capacity, said)
    fits = "does not fit" if step.fits is False else "fits" if step.fits else "may fit"
    said(f"{step.said_memory()} a device, {fits} ({step.lowering_s:.1f} s of tracing, {step.compile_s:.1f} s of compiling)")
    compiled.append(step)
    return step

  asked = attempt("as configured", config)
  if advise or asked.fits is False:
    changes = list(variants(config, mesh.size))
    for name, changed in changes:
      if attempt(name, changed).fits and not advise:
        break
    if asked.fits is False and not any(step.fits for step in compiled) and len(changes) > 1:
      attempt(*_everything(changes))
  capacity = next(filter(None, (_refused(step.refusal)[1] for step in compiled)), capacity)
  return plan_report.Plan(
    model=config.model.name,
    dtype=config.model.dtype,
    parameters=described.parameters,
    num_classes=classes,
    image_size=size,
    batch=config.batch,
    accumulate=config.accumulate,
    shard=config.shard,
    remat=config.model.remat,
    topology=topology,
    device_kind=device.device_kind,
    devices=mesh.size,
    capacity=capacity,
    chip=row,
    versions=_versions(device.platform),
    compilation_cache=jax.config.jax_compilation_cache_dir,
    steps=compiled,
    advice=plan_report.advice(compiled),
    date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  )


def variants(config: Config, devices: int) -> Iterator[tuple[str, Config]]:
  """(name, config) of what takes less memory, one change each, the cheapest first; without what is set already."""
  if not config.model.remat:
    yield "remat", dataclasses.replace(config, model=dataclasses.replace(config.model, remat=True))
  if not config.shard and devices > 1:
    yield "shard", dataclasses.replace(config, shard=True)
  for parts in (2, 4, 8):
    if parts > config.accumulate and config.batch % (devices * parts) == 0:
      yield f"accumulate={parts}", dataclasses.replace(config, accumulate=parts)


def _everything(changes: list[tuple[str, Config]]) -> tuple[str, Config]:
  """All of the changes together, the last where one takes the place of another."""
  names = dict((name.partition("=")[0], name) for name, _ in changes)
  last = changes[-1][1]
  return ", ".join(names.values()), dataclasses.replace(
    last,
    shard=any(c.shard for _, c in changes),
    model=dataclasses.replace(last.model, remat=any(c.model.remat for _, c in changes)),
  )


def counted_flops(config: Config, macs: int, devices: int) -> float:
  """FLOPs of one device in a step, by the model's multiply-adds an image and forward pass.

  2 FLOPs each, three passes (forward, and backward as two), four with remat; SAM's ascent adds its share of the images.
  """
  passes = (4 if config.model.remat else 3) * (1 + (config.optim.sam_share if config.optim.sam_rho else 0))
  return 2 * macs * passes * config.batch / devices


def lower(config: Config, mesh: Mesh, size: int, classes: int) -> jax.stages.Lowered:
  """The training loop's own step for a state and a batch that are shapes only, lowered for the platform of `mesh`."""
  graph, params, stats = split_network(nnx.eval_shape(lambda: build_network(config.model, classes)))
  per_epoch = step.IMAGENET_IMAGES / config.batch
  optimizer = optim.make_optimizer(
    config.optim, params, batch=config.batch, steps_per_epoch=per_epoch, total_steps=max(1, round(config.epochs * per_epoch))
  )
  abstract = jax.eval_shape(lambda params, stats: init_state(params, stats, optimizer, config), params, stats)
  like = sharding.place(mesh, abstract, shard=config.shard)
  batch = {
    "image": jax.ShapeDtypeStruct((config.batch, size, size, 3), jnp.uint8),
    "label": jax.ShapeDtypeStruct((config.batch,), jnp.int32),
  }
  if config.data.mix != "none":
    batch["mix_label"] = batch["label"]
    batch["ratio"] = jax.ShapeDtypeStruct((config.batch,), jnp.float32)
  return train_step_over(config, mesh, graph, optimizer, like).lower(like, batch)


def _compile(
  name: str, config: Config, mesh: Mesh, size: int, classes: int, macs: int, capacity: int | None, say: Callable[[str], None]
) -> plan_report.CompiledStep:
  device = mesh.devices.flat[0]
  row = chip(device.device_kind)
  counted = counted_flops(config, macs, mesh.size)
  say("tracing")
  begin = time.perf_counter()
  lowered = lower(config, mesh, size, classes)
  lowering_s = time.perf_counter() - begin
  say(f"compiling for {mesh.size} × {device.device_kind}" + (" (minutes)" if device.platform == "tpu" else ""))
  begin = time.perf_counter()
  program, refusal = None, ""
  try:
    with _heartbeat(say):
      program = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    refusal = " ".join(str(error).removeprefix("RESOURCE_EXHAUSTED: ").partition("HLO module")[0].split())[:400]
  known = {
    "name": name,
    "accumulate": config.accumulate,
    "lowering_s": lowering_s,
    "compile_s": time.perf_counter() - begin,
    "counted_flops": counted,
  }
  if program is None:
    return plan_report.CompiledStep(
      **known,
      memory=None,
      refusal=refusal,
      needed=_refused(refusal)[0],
      fits=False,
      flops=None,
      memory_bytes=None,
      collectives=[],
      roofline=None,
    )
  memory = _memory(program)
  if device.platform == "tpu":
    fits = True  # its compiler refuses what does not
  else:
    fits = None if None in (memory, capacity) else memory.total <= capacity
  costs = program.cost_analysis() or {}
  flops, moved = (costs.get(key) if costs.get(key, -1) > 0 else None for key in ("flops", "bytes accessed"))
  sent = hlo.parse(program.as_text(), mesh.size)
  line = plan_report.roofline(
    row, flops=max(flops or 0, counted), memory_bytes=moved, sent=sum(each.sent for each in sent), loops=config.accumulate
  )
  return plan_report.CompiledStep(
    **known, memory=memory, refusal="", needed=None, fits=fits, flops=flops, memory_bytes=moved, collectives=sent, roofline=line
  )


def _memory(program: jax.stages.Compiled) -> plan_report.PlannedMemory | None:
  analysis = program.memory_analysis()
  sizes = [getattr(analysis, f"{part}_size_in_bytes", None) for part in ("argument", "output", "alias", "temp", "generated_code")]
  return (
    None
    if None in sizes
    else plan_report.PlannedMemory(**dict(zip(("arguments", "outputs", "aliased", "temporaries", "code"), sizes, strict=True)))
  )


def _refused(refusal: str) -> tuple[int | None, int | None]:
  """(bytes needed, bytes a device has) in libtpu's "… (19.26G) exceeds available HBM (15.75G)" or "Used 20.1G of 15.75G hbm"."""
  found = re.search(
    r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)|"
    r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm",
    refusal,
  )
  if found is None:
    return None, None
  amounts = [text for text in found.groups() if text is not None]
  needed, available = (round(float(number) * 2 ** (10 * (1 + "KMGT".index(unit)))) for number, unit in (amounts[:2], amounts[2:]))
  return needed, available


def _capacity(device: jax.Device, sold: float | None) -> int | None:
  """Bytes for programs: the allocator's limit where there is a device, else as sold."""
  with contextlib.suppress(jax.errors.JaxRuntimeError, NotImplementedError, ValueError):  # absent devices have no allocator
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
      return int(limit)
  return None if sold is None else round(sold * plan_report.GIB)


def _image_size(config: Config) -> int:
  variant = models.variant(config.model.name, **config.model.all_overrides())
  return resolve.data_config(config).image_size or variant.train_resolution


def _versions(target: str) -> dict[str, str]:
  names = ("jax", "jaxlib", "flax", "optax", *(("libtpu",) if target == "tpu" else ()))
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    return {**{name: importlib.metadata.version(name) for name in names}, "python": platform.python_version()}
  return {"jax": jax.__version__, "python": platform.python_version()}


@contextlib.contextmanager
def _heartbeat(say: Callable[[str], None]) -> Iterator[None]:
  """A line every minute from another thread, since compilers are silent."""
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
