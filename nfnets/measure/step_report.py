"""What the benchmark of the training step hands out: the figures with their units and definitions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from nfnets.measure.program import size_text


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
  """Median, quartiles and extremes of `count` measurements."""

  median: float
  quartile1: float
  quartile3: float
  minimum: float
  maximum: float
  count: int

  @classmethod
  def of(cls, values: Sequence[float]) -> "Spread":
    low, first, middle, third, high = (float(q) for q in np.percentile(values, (0, 25, 50, 75, 100)))
    return cls(median=middle, quartile1=first, quartile3=third, minimum=low, maximum=high, count=len(values))

  def __str__(self) -> str:
    return f"quartiles {self.quartile1:.4g} to {self.quartile3:.4g}, extremes {self.minimum:.4g} and {self.maximum:.4g}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
  """Bytes on one device; None = this backend does not report it.

  arguments, outputs, aliased, temporaries: XLA's plan of the compiled step; aliased counts outputs that take the
  donated state's place. program: arguments + outputs - aliased + temporaries. peak: the most that was ever in use on
  the fullest device, from the beginning of the process (so with initialisation and autotuning) to the end of the
  configured step's runs. peak_before: the same before the first step; where the two are equal, the step did not set it.
  """

  arguments: int | None
  outputs: int | None
  aliased: int | None
  temporaries: int | None
  program: int | None
  peak_before: int | None
  peak: int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AgcOverhead:
  """The step with AGC against the step without, in blocks that take turns. Times in ms a step.

  ratio: median with / median without. pair_ratio: the ratios of the pairs of neighbouring blocks; its spread is the
  error.
  """

  with_agc_ms: Spread
  without_agc_ms: Spread
  ratio: float
  pair_ratio: Spread
  steps_per_block: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
  """Everything measured; `str()` gives it in words, `to_json()` as a dict for json.dumps."""

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
  compilation_cache: str | None  # JAX's directory of compiled programs; with one, compile_s may be its reading
  date: str  # UTC, ISO 8601
  # ---- before the first step, seconds
  init_s: float
  lowering_s: float
  compile_s: float
  # ---- time
  warmup_steps: int
  waited_step_ms: Spread  # each step waited for before the next is sent
  run_steps: int
  run_step_ms: float  # run_steps in a row, waited for once, at the end: as the training loop runs
  images_per_s: float  # from run_step_ms, over all devices
  images_per_s_per_device: float
  # ---- arithmetic
  forward_macs_per_image: int
  flops_per_image: int  # 3 · 2 · forward_macs_per_image
  xla_flops_per_image: float | None  # XLA's count of the program as lowered
  xla_optimised_flops_per_image: float | None  # and as compiled, where hand-written kernels may count for nothing
  tflops_per_device: float  # 10¹² flops_per_image a second, from run_step_ms
  peak_tflops_per_device: float | None
  mfu: float | None  # tflops_per_device / peak_tflops_per_device, in [0, 1]
  # ---- memory, donation, checks
  memory: Memory
  state_bytes: int
  donated_bytes: int  # of the state's, how many the step took over
  final_loss: float
  updates: int  # as the state counts them
  agc: AgcOverhead | None

  def to_json(self) -> dict[str, Any]:
    return {"benchmark": "step", **dataclasses.asdict(self)}

  def __str__(self) -> str:
    giga = lambda count: "not reported" if count is None else f"{count / 1e9:.4g} GFLOP"
    if self.peak_tflops_per_device is None:
      mfu = f"unknown chip {self.device_kind!r}: no peak to divide by, no MFU"
    else:
      mfu = f"MFU {100 * self.mfu:.2f} % of {self.peak_tflops_per_device:g} TFLOP/s, the chip's dense bfloat16 peak"
      mfu += "" if self.dtype == "bfloat16" else f" (this step computes in {self.dtype}, whose own peak is lower)"
    clipping = "no AGC" if self.clipping is None else f"AGC {self.clipping:g}{', tracked' if self.agc_track else ''}"
    average = "no EMA" if self.ema_decay is None else f"EMA {self.ema_decay:g}"
    memory = self.memory
    plan = peak = "not reported by this backend"
    if memory.program is not None:
      plan = (
        f"{size_text(memory.program)} a device = arguments {size_text(memory.arguments)} + outputs "
        f"{size_text(memory.outputs)} - aliased {size_text(memory.aliased)} + temporaries {size_text(memory.temporaries)}"
      )
    if memory.peak is not None:
      peak = f"{size_text(memory.peak)} a device since the process began ({size_text(memory.peak_before)} before the first step)"
    lines = [
      (
        "step of",
        f"{self.model}, {self.parameters:,} parameters, {self.num_classes} classes, {self.dtype}"
        f"{''.join(f', {key}={value!r}' for key, value in self.overrides.items())}; {self.optimizer}, "
        f"{clipping}, {average}",
      ),
      (
        "batch",
        f"{self.batch} images of {self.image_size}×{self.image_size}, {self.batch // self.devices} a device; "
        "synthetic, on the devices from the start",
      ),
      ("devices", f"{self.devices} × {self.device_kind} ({self.processes} process{'es' * (self.processes > 1)})"),
      ("init", f"{self.init_s:.2f} s (parameters and state, until they lie on the devices)"),
      ("lowering", f"{self.lowering_s:.2f} s"),
      ("compile", f"{self.compile_s:.2f} s (compilation cache: {self.compilation_cache or 'off'})"),
      (
        "step, waited for",
        f"median {self.waited_step_ms.median:.4g} ms, {self.waited_step_ms} (each of "
        f"{self.waited_step_ms.count} steps by itself, after {self.warmup_steps} to warm up)",
      ),
      (
        "step, in a run",
        f"{self.run_step_ms:.4g} ms (mean of {self.run_steps} in a row, waited for once, as training "
        "runs; the figures below are from this)",
      ),
      ("images/s", f"{self.images_per_s_per_device:,.1f} a device, {self.images_per_s:,.1f} in all"),
      (
        "FLOPs an image",
        f"{giga(self.flops_per_image)} = 3 (forward, two of backward) × 2 × "
        f"{self.forward_macs_per_image / 1e9:.4g} G multiply-adds of a forward pass at "
        f"{self.image_size} px; XLA counts {giga(self.xla_flops_per_image)} as lowered, "
        f"{giga(self.xla_optimised_flops_per_image)} as compiled",
      ),
      ("TFLOP/s", f"{self.tflops_per_device:.4g} a device; {mfu}"),
      ("memory, XLA's plan", plan),
      ("memory, peak in use", peak),
      ("donated", f"{size_text(self.donated_bytes)} of the state's {size_text(self.state_bytes)}"),
    ]
    if self.agc is not None:
      lines.append(
        (
          "AGC overhead",
          f"× {self.agc.ratio:.4f} = {self.agc.with_agc_ms.median:.4g} ms with / "
          f"{self.agc.without_agc_ms.median:.4g} ms without, medians; by pairs of blocks: "
          f"{self.agc.pair_ratio} ({self.agc.pair_ratio.count} pairs of blocks of "
          f"{self.agc.steps_per_block} step{'s' * (self.agc.steps_per_block > 1)}, "
          "taking turns)",
        )
      )
    lines += [
      ("checked", f"loss {self.final_loss:.4g} after {self.updates} updates, not halted"),
      (
        "with",
        ", ".join(f"{name} {version}" for name, version in self.versions.items())
        + f"; XLA_FLAGS {self.xla_flags!r}; {self.date}",
      ),
    ]
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label.ljust(width)}  {text}" for label, text in lines)
