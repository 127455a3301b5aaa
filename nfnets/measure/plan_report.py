"""Holds the figures of a plan of the training step (memory, arithmetic, traffic, roofline), and puts them into words."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import rich.table

from nfnets.measure import hlo
from nfnets.measure.chips import Chip
from nfnets.measure.program import ProgramMemory, size_text, versions_text
from nfnets.measure.traffic import Operation

GIB = 2**30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
  """Holds the seconds that a step takes at the chip's peaks, if nothing is lost.

  Attributes:
    compute: the arithmetic alone.
    memory: the memory's traffic alone, at the least that the compiler's count allows.
    memory_high: the memory's traffic at the most that the compiler's count allows.
    links: what the devices send, alone.
  """

  compute: float
  memory: float
  memory_high: float
  links: float

  @property
  def low(self) -> float:
    """The largest of the three: all at the same time."""
    return max(self.compute, self.memory, self.links)

  @property
  def high(self) -> float:
    """The sum of the three: one after the other, with `memory_high`."""
    return self.compute + self.memory_high + self.links

  @property
  def bound(self) -> str:
    """The name of the largest of the three."""
    return max(("compute", "memory", "links"), key=lambda term: getattr(self, term))


def roofline(
  chip: Chip | None, *, flops: float | None, memory_bytes: float | None, sent: float, loops: int = 1
) -> Roofline | None:
  """Divides what one device does in a step by the chip's peaks.

  Args:
    chip: the device's peaks.
    flops: FLOP that it computes.
    memory_bytes: bytes that it moves to and from its memory.
    sent: bytes that it sends.
    loops: how often the step's loop runs, whose bytes `memory_bytes` counts once; they are between once and `loops` times that.

  Returns:
    The roofline; None where the chip, one of its bandwidths or a count is unknown. The links' matters only if anything is sent.
  """
  if chip is None or not flops or not memory_bytes or chip.memory_gb_s is None:
    return None
  if sent and chip.link_gb_s is None:
    return None
  memory = memory_bytes / (1e9 * chip.memory_gb_s)
  return Roofline(
    compute=flops / (1e12 * chip.tflops),
    memory=memory,
    memory_high=loops * memory,
    links=sent / (1e9 * chip.link_gb_s) if sent and chip.link_gb_s else 0.0,
  )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompiledStep:
  """Holds one compilation of the step; figures are of one device, None where not reported or not compiled.

  Attributes:
    name: the change of the config, e.g. "remat".
    accumulate: the config's.
    memory: the compiler's plan of the memory.
    refusal: the compiler's message where there is too little memory, else empty.
    needed: the bytes that `refusal` names, of temporaries alone.
    fits: whether the step fits into the device's memory; None where that is unknown.
    lowering_s: seconds of tracing.
    compile_s: seconds of compiling.
    flops: the compiler's count, in which the body of a loop (accumulation) stands once.
    counted_flops: by the model's multiply-adds, see `plan.counted_flops`.
    memory_bytes: the compiler's count of bytes to and from memory, with the body of a loop once.
    collectives: what the devices send each other.
    roofline: the estimated time.
    main_bytes: of these, those to and from main memory, by `traffic.operations`; None where no faster memory takes part.
    operations: all of them, if any were asked for.
  """

  name: str
  accumulate: int
  memory: ProgramMemory | None
  refusal: str = ""
  needed: int | None = None
  fits: bool | None
  lowering_s: float
  compile_s: float
  flops: float | None = None
  counted_flops: float
  memory_bytes: float | None = None
  main_bytes: int | None = None
  collectives: list[hlo.Collective] = dataclasses.field(default_factory=list)
  roofline: Roofline | None = None
  operations: list[Operation] = dataclasses.field(default_factory=list)

  def by_kind(self) -> dict[str, dict[str, float]]:
    """Sums up the collectives of a step by kind: {"count", "bytes" of the whole arrays, "sent" by a device in a ring}."""
    return {
      kind: {
        "count": sum(collective.times for collective in self.collectives if collective.kind == kind),
        "bytes": sum(collective.bytes * collective.times for collective in self.collectives if collective.kind == kind),
        "sent": sum(collective.sent for collective in self.collectives if collective.kind == kind),
      }
      for kind in hlo.KINDS
    }

  def to_json(self) -> dict[str, Any]:
    """Returns all figures by name, ready for json.dumps."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    memory = None if self.memory is None else {**dataclasses.asdict(self.memory), "total": self.memory.total}
    line = self.roofline
    times = None if line is None else {**dataclasses.asdict(line), "low": line.low, "high": line.high, "bound": line.bound}
    operations = [dataclasses.asdict(operation) for operation in self.operations[:100]]
    return {**values, "memory": memory, "collectives": self.by_kind(), "roofline": times, "operations": operations}

  def memory_text(self) -> str:
    """Puts the memory into words: the total, or that it is more than what the compiler refused."""
    if self.memory is not None:
      return size_text(self.memory.total)
    return f"over {size_text(self.needed)}" if self.needed else "too much" if self.refusal else "not reported"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
  """Holds what was planned; `steps` holds the configured step first, then the variants that were compiled too."""

  model: str
  dtype: str
  parameters: int
  num_classes: int
  image_size: int
  batch: int
  accumulate: int
  shard: bool
  remat: bool
  scan: bool
  topology: str | None  # None: this machine's own devices
  device_kind: str
  devices: int
  capacity: int | None  # bytes of memory that a device has for programs
  chip: Chip | None
  versions: dict[str, str]
  compilation_cache: str | None  # JAX's directory of compiled programs; with one, compile_s may be its reading
  date: str  # UTC, ISO 8601
  steps: list[CompiledStep]
  advice: str

  def to_json(self) -> dict[str, Any]:
    """Returns all figures by name, ready for json.dumps."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    chip = None if self.chip is None else dataclasses.asdict(self.chip)
    return {"plan": "step", **values, "chip": chip, "steps": [step.to_json() for step in self.steps]}

  def table(self) -> rich.table.Table:
    """Lists the figures of the configured step, or of the first variant that compiled if it did not."""
    table = rich.table.Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for label, text in [*self._setting(), *self._figures(next((step for step in self.steps if step.memory), self.steps[0]))]:
      table.add_row(label, text)
    return table

  def variants(self) -> rich.table.Table:
    """Lists all compiled steps, one a row."""
    table = rich.table.Table(pad_edge=False)
    for head in ("step", "memory a device", "fits", "state and batch", "temporaries", "estimated step", "compile"):
      table.add_column(head, justify="left" if head == "step" else "right")
    for step in self.steps:
      parts = (size_text(step.memory.arguments), size_text(step.memory.temporaries)) if step.memory else ("", "")
      time = "" if step.roofline is None else f"{_ms(step.roofline.low)} to {_ms(step.roofline.high)}"
      table.add_row(step.name, step.memory_text(), _fits(step.fits), *parts, time, f"{step.compile_s:.1f} s")
    return table

  def assumptions(self) -> list[str]:
    """Lists the assumptions behind the estimated time of a step."""
    chip = self.chip
    if chip is None or chip.memory_gb_s is None:
      return [
        f"estimated step: unknown, since {self.device_kind!r} or its bandwidths are not in the table of known chips "
        "(nfnets/measure/chips.py)"
      ]
    link = "unknown" if chip.link_gb_s is None else f"{chip.link_gb_s:,g} GB/s out of a device over all its links"
    notes = [
      f"peaks of {self.device_kind}: {chip.tflops:,g} TFLOP/s (dense bfloat16), {chip.memory_gb_s:,g} GB/s of memory, {link}",
      "nothing is lost: every unit at its peak from the first to the last moment, no data loading, no start of a kernel; no "
      "efficiencies are assumed",
      "low end: arithmetic, memory and links at the same time, the slowest counts; high end: one after the other",
      "arithmetic is the larger of the compiler's count and the model's own (calls into libraries may count as nothing)",
      'memory traffic is XLA\'s "bytes accessed": operands and results of every fused operation, also where they stay in a '
      "cache or on-chip memory; a step that memory bounds can so be faster than the low end",
      "rings: a device sends 2 (n-1)/n of the bytes of an all-reduce, (n-1)/n of an all-gather, reduce-scatter or all-to-all",
    ]
    if self.dtype != "bfloat16":
      notes.append(f"the step computes in {self.dtype}, whose peak is lower than bfloat16's")
    if any(step.accumulate > 1 for step in self.steps):
      notes.append(
        "accumulation is a loop, whose body XLA's counts hold once: arithmetic is then taken from the model's "
        "multiply-adds, and the memory's traffic lies between once and `accumulate` times the count"
      )
    if self.scan:
      notes.append("blocks run in loops, whose bodies XLA's counts hold once: the memory's traffic is more than its count")
    return notes

  def _setting(self) -> list[tuple[str, str]]:
    """Describes the step and the devices, as (label, text)."""
    options = ", ".join(
      word
      for word in (
        f"accumulate={self.accumulate}" if self.accumulate > 1 else "",
        "sharded" if self.shard else "",
        "remat" if self.remat else "",
        "blocks in loops" if self.scan else "",
      )
      if word
    )
    machine = self.topology or "this machine"
    return [
      (
        "step of",
        f"{self.model}, {self.parameters:,} parameters, {self.num_classes} classes, {self.dtype}{options and f'; {options}'}",
      ),
      ("batch", f"{self.batch} images of {self.image_size}×{self.image_size}, {self.batch // self.devices} a device"),
      ("devices", f"{machine}: {self.devices} × {self.device_kind}"),
      ("memory a device", "unknown" if self.capacity is None else size_text(self.capacity)),
    ]

  def _figures(self, step: CompiledStep) -> list[tuple[str, str]]:
    """Describes the figures of `step`, as (label, text)."""
    rows = [("figures of", step.name)] if step is not self.steps[0] else []
    fits = _fits(step.fits)
    if step.memory is None:
      return [
        *rows,
        ("needed", f"fits: {fits}; {step.refusal or 'not reported by this backend'}"),
        ("arithmetic", f"{_tera(step.counted_flops)} a device by the model's multiply-adds"),
        ("compile", f"{step.lowering_s:.1f} s of tracing, {step.compile_s:.1f} s of compiling"),
      ]
    memory = step.memory
    sent = [
      f"{kind} {size_text(values['bytes'])} in {values['count']}" for kind, values in step.by_kind().items() if values["count"]
    ]
    counts = "not reported by this backend" if step.flops is None else f"{_tera(step.flops)} as compiled"
    moved = "not reported by this backend" if step.memory_bytes is None else f"{step.memory_bytes / 1e9:,.2f} GB"
    main = "" if step.main_bytes is None else f" ({step.main_bytes / 1e9:,.2f} GB of it from and to main memory)"
    return [
      *rows,
      ("needed", f"{step.memory_text()}, fits: {fits}; {memory.parts_text()} + code {size_text(memory.code)}"),
      ("arithmetic", f"{counts}, {_tera(step.counted_flops)} by the model's multiply-adds, a device"),
      ("memory traffic", f"{moved} a device{main}"),
      (
        "sent",
        f"{', '.join(sent) or 'nothing'}; {size_text(sum(collective.sent for collective in step.collectives))} out of a device",
      ),
      ("estimated step", self._time_text(step.roofline)),
      (
        "compile",
        f"{step.lowering_s:.1f} s of tracing, {step.compile_s:.1f} s of compiling (compilation cache: "
        f"{self.compilation_cache or 'off'})",
      ),
      ("with", f"{versions_text(self.versions)}; {self.date}"),
    ]

  def _time_text(self, line: Roofline | None) -> str:
    """Puts the estimated time of a step into words."""
    if line is None:
      return "unknown"
    images = f"{self.batch / line.high:,.0f} to {self.batch / line.low:,.0f} images/s"
    memory = f"{_ms(line.memory)}{f' to {_ms(line.memory_high)}' if line.memory_high > line.memory else ''}"
    return (
      f"{_ms(line.low)} to {_ms(line.high)}, {images}; bound by {line.bound}: compute {_ms(line.compute)}, memory {memory}, "
      f"links {_ms(line.links)}"
    )


def picture(plan: Plan, file: str) -> None:
  """Draws the memory of every compiled step as stacked bars, and the device's as a line, into `file`."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 1.4 + 0.4 * len(plan.steps)), layout="constrained")
  axes = figure.subplots()
  names, left = [step.name for step in plan.steps], [0.0] * len(plan.steps)
  parts = {
    "state and batch": lambda memory: memory.arguments + memory.outputs - memory.aliased,
    "temporaries": lambda memory: memory.temporaries,
    "code": lambda memory: memory.code,
  }
  for (label, part), color in zip(parts.items(), ("#4878a8", "#e49444", "#85b6b2"), strict=True):
    values = [part(step.memory) / GIB if step.memory else 0.0 for step in plan.steps]
    axes.barh(names, values, left=left, label=label, color=color)
    left = [begin + value for begin, value in zip(left, values, strict=True)]
  for row, step in enumerate(plan.steps):
    if step.needed:
      left[row] = step.needed / GIB
      axes.barh(row, left[row], color="none", edgecolor="#d1605e", hatch="//")
    axes.text(left[row], row, f" {step.memory_text()}", va="center", fontsize=8)
  if plan.capacity is not None:
    axes.axvline(plan.capacity / GIB, color="#d1605e", linestyle="--", label="a device has")
  axes.invert_yaxis()
  axes.margins(x=0.15)
  axes.set_xlabel("GiB a device")
  axes.set_title(f"{plan.model}, {plan.batch} images a step, {plan.topology or 'this machine'}", fontsize=10)
  figure.legend(fontsize=8, loc="outside lower center", ncols=4)
  figure.savefig(file, dpi=150)


def advice(steps: Sequence[CompiledStep]) -> str:
  """Says in one line whether the configured step, which is first, fits, and which variant does if not."""
  configured, *others = steps
  fitting = [step for step in others if step.fits]
  if configured.fits is None and not fitting:
    return "whether it fits is unknown: neither the device nor the table of known chips says how much memory there is"
  if configured.fits:
    return "it fits as configured"
  if fitting:
    best = min(fitting, key=lambda step: (step.roofline.low if step.roofline else 0.0, step.memory.total if step.memory else 0))
    return f"it does not fit as configured; it does with {best.name}"
  names = "; ".join(step.name for step in others) or "any other setting"
  return f"it does not fit, nor with {names}: lower config.batch or take more devices"


def _fits(fits: bool | None) -> str:
  return "unknown" if fits is None else "yes" if fits else "no"


def _ms(seconds: float) -> str:
  return f"{1e3 * seconds:,.4g} ms"


def _tera(flops: float) -> str:
  return f"{flops / 1e12:,.4g} TFLOP" if flops >= 1e11 else f"{flops / 1e9:,.4g} GFLOP"
