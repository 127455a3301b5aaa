"""What a plan of the training step hands out: memory, arithmetic, traffic and a roofline, with their units and definitions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import rich.table

from nfnets.measure import hlo
from nfnets.measure.chips import Chip
from nfnets.measure.program import ProgramMemory, size_text

GIB = 2**30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
  """Seconds that a step takes at the chip's peaks, nothing lost.

  compute, memory, links: each as if the others were not there. low: the largest, all three at the same time; high: their sum, one
  after the other (with `memory_high`, the most that the memory's traffic can be, where the compiler's count leaves it open).
  """

  compute: float
  memory: float
  memory_high: float
  links: float

  @property
  def low(self) -> float:
    return max(self.compute, self.memory, self.links)

  @property
  def high(self) -> float:
    return self.compute + self.memory_high + self.links

  @property
  def bound(self) -> str:
    return max(("compute", "memory", "links"), key=lambda term: getattr(self, term))


def roofline(
  chip: Chip | None, *, flops: float | None, memory_bytes: float | None, sent: float, loops: int = 1
) -> Roofline | None:
  """From what one device computes [FLOP], moves to and from its memory [bytes] and sends [bytes] in a step.

  loops: how often the part of the step runs that `memory_bytes` counts once; its bytes are between once and so many times.
  None where the chip, its bandwidths or a count are unknown; the links' only matters if anything is sent.
  """
  if chip is None or not flops or not memory_bytes or chip.memory_gb_s is None or sent and chip.link_gb_s is None:
    return None
  memory = memory_bytes / (1e9 * chip.memory_gb_s)
  return Roofline(
    compute=flops / (1e12 * chip.tflops),
    memory=memory,
    memory_high=loops * memory,
    links=sent / (1e9 * chip.link_gb_s) if sent else 0.0,
  )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompiledStep:
  """One compilation of the step; figures are of one device. None: not reported, or not compiled since it does not fit.

  refusal: what the compiler said where it found too little memory; needed: the bytes that it names there, temporaries alone.
  flops, memory_bytes: the compiler's counts, in which the body of a loop (accumulation) stands once. counted_flops: by the
  model's multiply-adds, see `plan.counted_flops`.
  """

  name: str
  accumulate: int
  memory: ProgramMemory | None
  refusal: str
  needed: int | None
  fits: bool | None
  lowering_s: float
  compile_s: float
  flops: float | None
  counted_flops: float
  memory_bytes: float | None
  collectives: list[hlo.Collective]
  roofline: Roofline | None

  def by_kind(self) -> dict[str, dict[str, float]]:
    """{kind: {"count", "bytes", "sent"}} a step; `bytes` of the whole arrays, `sent` by a device in a ring."""
    return {
      kind: {
        "count": sum(each.times for each in self.collectives if each.kind == kind),
        "bytes": sum(each.bytes * each.times for each in self.collectives if each.kind == kind),
        "sent": sum(each.sent for each in self.collectives if each.kind == kind),
      }
      for kind in hlo.KINDS
    }

  def to_json(self) -> dict[str, Any]:
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    memory = None if self.memory is None else {**dataclasses.asdict(self.memory), "total": self.memory.total}
    line = self.roofline
    times = None if line is None else {**dataclasses.asdict(line), "low": line.low, "high": line.high, "bound": line.bound}
    return {**values, "memory": memory, "collectives": self.by_kind(), "roofline": times}

  def said_memory(self) -> str:
    """In words: the total, or more than what the compiler refused."""
    if self.memory is not None:
      return size_text(self.memory.total)
    return f"over {size_text(self.needed)}" if self.needed else "too much" if self.refusal else "not reported"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
  """The step that was asked for and, behind it in `steps`, the variants that were compiled as well."""

  model: str
  dtype: str
  parameters: int
  num_classes: int
  image_size: int
  batch: int
  accumulate: int
  shard: bool
  remat: bool
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
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    chip = None if self.chip is None else dataclasses.asdict(self.chip)
    return {"plan": "step", **values, "chip": chip, "steps": [step.to_json() for step in self.steps]}

  def table(self) -> rich.table.Table:
    """The step asked for, or the first variant that compiled if it did not, figure by figure."""
    table = rich.table.Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for label, text in [*self._asked(), *self._figures(next((s for s in self.steps if s.memory), self.steps[0]))]:
      table.add_row(label, text)
    return table

  def variants(self) -> rich.table.Table:
    """All compiled steps, one a row."""
    table = rich.table.Table(pad_edge=False)
    for head in ("step", "memory a device", "fits", "state and batch", "temporaries", "estimated step", "compile"):
      table.add_column(head, justify="left" if head == "step" else "right")
    for step in self.steps:
      parts = (size_text(step.memory.arguments), size_text(step.memory.temporaries)) if step.memory else ("", "")
      time = "" if step.roofline is None else f"{_ms(step.roofline.low)} to {_ms(step.roofline.high)}"
      table.add_row(step.name, step.said_memory(), _fits(step.fits), *parts, time, f"{step.compile_s:.1f} s")
    return table

  def assumptions(self) -> list[str]:
    """What the estimated step takes for granted."""
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
    return notes

  def _asked(self) -> list[tuple[str, str]]:
    how = ", ".join(
      word
      for word in (
        f"accumulate={self.accumulate}" if self.accumulate > 1 else "",
        "sharded" if self.shard else "",
        "remat" if self.remat else "",
      )
      if word
    )
    where = self.topology or "this machine"
    return [
      ("step of", f"{self.model}, {self.parameters:,} parameters, {self.num_classes} classes, {self.dtype}{how and f'; {how}'}"),
      ("batch", f"{self.batch} images of {self.image_size}×{self.image_size}, {self.batch // self.devices} a device"),
      ("devices", f"{where}: {self.devices} × {self.device_kind}"),
      ("memory a device", "unknown" if self.capacity is None else size_text(self.capacity)),
    ]

  def _figures(self, step: CompiledStep) -> list[tuple[str, str]]:
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
    line = step.roofline
    times = "unknown"
    if line is not None:
      images = f"{self.batch / line.high:,.0f} to {self.batch / line.low:,.0f} images/s"
      times = (
        f"{_ms(line.low)} to {_ms(line.high)}, {images}; bound by {line.bound}: compute {_ms(line.compute)}, memory "
        f"{_ms(line.memory)}{f' to {_ms(line.memory_high)}' if line.memory_high > line.memory else ''}, links "
        f"{_ms(line.links)}"
      )
    counts = "not reported by this backend" if step.flops is None else f"{_tera(step.flops)} as compiled"
    moved = "not reported by this backend" if step.memory_bytes is None else f"{step.memory_bytes / 1e9:,.2f} GB"
    return [
      *rows,
      (
        "needed",
        f"{step.said_memory()}, fits: {fits}; arguments {size_text(memory.arguments)} + outputs {size_text(memory.outputs)} "
        f"- aliased {size_text(memory.aliased)} + temporaries {size_text(memory.temporaries)} + code {size_text(memory.code)}",
      ),
      ("arithmetic", f"{counts}, {_tera(step.counted_flops)} by the model's multiply-adds, a device"),
      ("memory traffic", f"{moved} a device"),
      ("sent", f"{', '.join(sent) or 'nothing'}; {size_text(sum(each.sent for each in step.collectives))} out of a device"),
      ("estimated step", times),
      (
        "compile",
        f"{step.lowering_s:.1f} s of tracing, {step.compile_s:.1f} s of compiling (compilation cache: "
        f"{self.compilation_cache or 'off'})",
      ),
      ("with", f"{', '.join(f'{name} {version}' for name, version in self.versions.items())}; {self.date}"),
    ]


def picture(plan: Plan, file: str) -> None:
  """Draws the memory of every compiled step as stacked bars, with the device's as a line."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 1.4 + 0.4 * len(plan.steps)), layout="constrained")
  axes = figure.subplots()
  names, left = [step.name for step in plan.steps], [0.0] * len(plan.steps)
  parts = {
    "state and batch": lambda m: m.arguments + m.outputs - m.aliased,
    "temporaries": lambda m: m.temporaries,
    "code": lambda m: m.code,
  }
  for (label, of), color in zip(parts.items(), ("#4878a8", "#e49444", "#85b6b2"), strict=True):
    values = [of(step.memory) / GIB if step.memory else 0.0 for step in plan.steps]
    axes.barh(names, values, left=left, label=label, color=color)
    left = [a + b for a, b in zip(left, values, strict=True)]
  for place, step in enumerate(plan.steps):
    if step.needed:
      left[place] = step.needed / GIB
      axes.barh(place, left[place], color="none", edgecolor="#d1605e", hatch="//")
    axes.text(left[place], place, f" {step.said_memory()}", va="center", fontsize=8)
  if plan.capacity is not None:
    axes.axvline(plan.capacity / GIB, color="#d1605e", linestyle="--", label="a device has")
  axes.invert_yaxis()
  axes.margins(x=0.15)
  axes.set_xlabel("GiB a device")
  axes.set_title(f"{plan.model}, {plan.batch} images a step, {plan.topology or 'this machine'}", fontsize=10)
  figure.legend(fontsize=8, loc="outside lower center", ncols=4)
  figure.savefig(file, dpi=150)


def advice(steps: Sequence[CompiledStep]) -> str:
  """In one line, what the compiled steps say about memory."""
  asked, *others = steps
  fitting = [step for step in others if step.fits]
  if asked.fits is None and not fitting:
    return "whether it fits is unknown: neither the device nor the table of known chips says how much memory there is"
  if asked.fits:
    return "it fits as configured"
  if fitting:
    best = min(fitting, key=lambda step: (step.roofline.low if step.roofline else 0.0, step.memory.total))
    return f"it does not fit as configured; it does with {best.name}"
  tried = "; ".join(step.name for step in others) or "any other setting"
  return f"it does not fit, nor with {tried}: lower config.batch or take more devices"


def _fits(fits: bool | None) -> str:
  return {True: "yes", False: "no", None: "unknown"}[fits]


def _ms(seconds: float) -> str:
  return f"{1e3 * seconds:,.4g} ms"


def _tera(flops: float) -> str:
  return f"{flops / 1e12:,.4g} TFLOP" if flops >= 1e11 else f"{flops / 1e9:,.4g} GFLOP"
