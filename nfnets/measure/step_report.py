"""Holds the figures of the training step's benchmark, with their units and definitions, and puts them into words."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from nfnets.measure.program import ProgramMemory, size_text, versions_text


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
  """Holds the median, quartiles and extremes of `count` measurements."""

  median: float
  quartile1: float
  quartile3: float
  minimum: float
  maximum: float
  count: int

  @classmethod
  def of(cls, values: Sequence[float]) -> "Spread":
    """Computes them from the measurements, with NumPy's quantiles."""
    low, first, middle, third, high = (float(q) for q in np.percentile(values, (0, 25, 50, 75, 100)))
    return cls(median=middle, quartile1=first, quartile3=third, minimum=low, maximum=high, count=len(values))

  def __str__(self) -> str:
    return f"quartiles {self.quartile1:.4g} to {self.quartile3:.4g}, extremes {self.minimum:.4g} and {self.maximum:.4g}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
  """Holds bytes on one device; None where this backend does not report them.

  Attributes:
    compiled: the compiler's plan of the step.
    peak_before: the most that was ever in use on the fullest device, from the beginning of the process (so with initialisation
      and autotuning) to the first step.
    peak: the same up to the end of the configured step's runs; where it equals `peak_before`, the step did not set it.
  """

  compiled: ProgramMemory | None
  peak_before: int | None
  peak: int | None

  def to_json(self) -> dict[str, int | None]:
    """Returns the figures by name; `program` is arguments + outputs - aliased + temporaries."""
    names = ("arguments", "outputs", "aliased", "temporaries")
    parts = {name: None if self.compiled is None else getattr(self.compiled, name) for name in names}
    total = None if self.compiled is None else self.compiled.data
    return {**parts, "program": total, "peak_before": self.peak_before, "peak": self.peak}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AgcOverhead:
  """Compares the step with AGC and the step without, timed in turn in blocks of steps; times are in ms a step.

  Attributes:
    ratio: median with AGC / median without.
    pair_ratio: the ratios of the pairs of neighbouring blocks; its spread is the error.
  """

  with_agc_ms: Spread
  without_agc_ms: Spread
  ratio: float
  pair_ratio: Spread
  steps_per_block: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
  """Holds all figures; `str()` puts them into words, `to_json()` into a dict for json.dumps."""

  # ---- what ran
  model: str
  overrides: dict[str, Any]
  dtype: str
  parameters: int
  num_classes: int
  image_size: int  # pixels a side
  batch: int  # images a step, over all devices
  optimizer: str
  clipping: float | None  # AGC's lambda; None = no AGC
  agc_track: bool
  ema_decay: float | None
  # ---- on what, with what
  device_kind: str
  devices: int
  processes: int
  versions: dict[str, str]
  xla_flags: str  # the environment's XLA_FLAGS
  glibc_tunables: str  # the environment's GLIBC_TUNABLES, which launch sets so that memory comes in huge pages
  compilation_cache: str | None  # JAX's directory of compiled programs; with one, compile_s may be its reading
  date: str  # UTC, ISO 8601
  # ---- before the first step, seconds
  init_s: float
  lowering_s: float
  compile_s: float
  # ---- time
  warmup_steps: int
  waited_step_ms: Spread  # each step is waited for before the next is sent
  run_steps: int
  run_step_ms: float  # mean of run_steps steps in a row, waited for once at the end, as the training loop runs
  images_per_s: float  # from run_step_ms, over all devices
  images_per_s_per_device: float
  # ---- arithmetic
  forward_macs_per_image: int
  flops_per_image: int  # 3 · 2 · forward_macs_per_image
  xla_flops_per_image: float | None  # XLA's count of the program as lowered
  xla_optimised_flops_per_image: float | None  # XLA's count as compiled, which may leave out hand-written kernels
  tflops_per_device: float  # 10¹² flops_per_image a second, from run_step_ms
  peak_tflops_per_device: float | None
  mfu: float | None  # tflops_per_device / peak_tflops_per_device, in [0, 1]
  # ---- memory, donation, checks
  memory: Memory
  state_bytes: int
  donated_bytes: int  # how many of state_bytes the step took over
  final_loss: float
  updates: int  # updates that the state counted
  agc: AgcOverhead | None

  def to_json(self) -> dict[str, Any]:
    """Returns all figures by name, ready for json.dumps."""
    return {"benchmark": "step", **dataclasses.asdict(self), "memory": self.memory.to_json()}

  def __str__(self) -> str:
    lines = [*self._setting(), *self._times(), *self._arithmetic(), *self._memory(), *self._checks()]
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label.ljust(width)}  {text}" for label, text in lines)

  def _setting(self) -> list[tuple[str, str]]:
    """Describes the step, the batch and the devices, as (label, text)."""
    clipping = "no AGC" if self.clipping is None else f"AGC {self.clipping:g}{', tracked' if self.agc_track else ''}"
    average = "no EMA" if self.ema_decay is None else f"EMA {self.ema_decay:g}"
    overrides = "".join(f", {name}={value!r}" for name, value in self.overrides.items())
    return [
      (
        "step of",
        f"{self.model}, {self.parameters:,} parameters, {self.num_classes} classes, {self.dtype}{overrides}; "
        f"{self.optimizer}, {clipping}, {average}",
      ),
      (
        "batch",
        f"{self.batch} images of {self.image_size}×{self.image_size}, {self.batch // self.devices} a device; "
        "synthetic, on the devices from the start",
      ),
      ("devices", f"{self.devices} × {self.device_kind} ({self.processes} process{'es' * (self.processes > 1)})"),
    ]

  def _times(self) -> list[tuple[str, str]]:
    """Describes the times and the speed."""
    waited = self.waited_step_ms
    return [
      ("init", f"{self.init_s:.2f} s (parameters and state, until they lie on the devices)"),
      ("lowering", f"{self.lowering_s:.2f} s"),
      ("compile", f"{self.compile_s:.2f} s (compilation cache: {self.compilation_cache or 'off'})"),
      (
        "step, waited for",
        f"median {waited.median:.4g} ms, {waited} (each of {waited.count} steps by itself, after {self.warmup_steps} to warm up)",
      ),
      (
        "step, in a run",
        f"{self.run_step_ms:.4g} ms (mean of {self.run_steps} in a row, waited for once, as training "
        "runs; the figures below are from this)",
      ),
      ("images/s", f"{self.images_per_s_per_device:,.1f} a device, {self.images_per_s:,.1f} in all"),
    ]

  def _arithmetic(self) -> list[tuple[str, str]]:
    """Describes the FLOPs of an image and the FLOP/s of a device."""
    if self.peak_tflops_per_device is None or self.mfu is None:
      mfu = f"unknown chip {self.device_kind!r}: no peak to divide by, no MFU"
    else:
      mfu = f"MFU {100 * self.mfu:.2f} % of {self.peak_tflops_per_device:g} TFLOP/s, the chip's dense bfloat16 peak"
      mfu += "" if self.dtype == "bfloat16" else f" (this step computes in {self.dtype}, whose own peak is lower)"
    return [
      (
        "FLOPs an image",
        f"{_gigaflop(self.flops_per_image)} = 3 (forward, two of backward) × 2 × "
        f"{self.forward_macs_per_image / 1e9:.4g} G multiply-adds of a forward pass at "
        f"{self.image_size} px; XLA counts {_gigaflop(self.xla_flops_per_image)} as lowered, "
        f"{_gigaflop(self.xla_optimised_flops_per_image)} as compiled",
      ),
      ("TFLOP/s", f"{self.tflops_per_device:.4g} a device; {mfu}"),
    ]

  def _memory(self) -> list[tuple[str, str]]:
    """Describes the memory and what of the state was donated."""
    plan = peak = "not reported by this backend"
    compiled = self.memory.compiled
    if compiled is not None:
      plan = f"{size_text(compiled.data)} a device = {compiled.parts_text()}"
    if self.memory.peak is not None and self.memory.peak_before is not None:
      before = size_text(self.memory.peak_before)
      peak = f"{size_text(self.memory.peak)} a device since the process began ({before} before the first step)"
    return [
      ("memory, XLA's plan", plan),
      ("memory, peak in use", peak),
      ("donated", f"{size_text(self.donated_bytes)} of the state's {size_text(self.state_bytes)}"),
    ]

  def _checks(self) -> list[tuple[str, str]]:
    """Describes AGC's overhead where it was measured, the checks and the versions."""
    lines = []
    if self.agc is not None:
      agc, ratios = self.agc, self.agc.pair_ratio
      lines.append(
        (
          "AGC overhead",
          f"× {agc.ratio:.4f} = {agc.with_agc_ms.median:.4g} ms with / {agc.without_agc_ms.median:.4g} ms without, medians; "
          f"by pairs of blocks: {ratios} ({ratios.count} pairs of blocks of {agc.steps_per_block} "
          f"step{'s' * (agc.steps_per_block > 1)}, taking turns)",
        )
      )
    return [
      *lines,
      ("checked", f"loss {self.final_loss:.4g} after {self.updates} updates, not halted"),
      (
        "with",
        f"{versions_text(self.versions)}; XLA_FLAGS {self.xla_flags!r}; GLIBC_TUNABLES {self.glibc_tunables!r}; {self.date}",
      ),
    ]


def _gigaflop(count: float | None) -> str:
  return "not reported" if count is None else f"{count / 1e9:.4g} GFLOP"
