"""Holds the figures of our training step beside a peer's, and puts them into words."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from nfnets.measure.program import versions_text
from nfnets.measure.step_report import Spread


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SideReport:
  """What one side took.

  Attributes:
    network: what ran, in words.
    device: what it ran on, as its framework calls it.
    parameters: how many numbers it trains.
    start_s: seconds from the start of its process, with imports, until it was ready.
    build_s: of these, for network, optimizer and batch.
    compile_s: of these, for tracing and compiling; in PyTorch, for the first step.
    step_ms: milliseconds of a step, over all blocks of steps of all rounds.
    round_ms: the median of each round's blocks.
    images_per_s: batch / the median of `step_ms`.
    loss: after the last step.
    versions: of its packages.
  """

  network: str
  device: str
  parameters: int
  start_s: float
  build_s: float
  compile_s: float
  step_ms: Spread
  round_ms: tuple[float, ...]
  images_per_s: float
  loss: float
  versions: dict[str, str]

  @classmethod
  def of(
    cls, facts: dict[str, Any], start_s: float, rounds: Sequence[Sequence[float]], loss: float, *, batch: int
  ) -> "SideReport":
    """Makes it of what a side's process said, and of the seconds a step of each round's blocks."""
    named = {name: facts[name] for name in ("network", "device", "parameters", "build_s", "compile_s", "versions")}
    step_ms = Spread.of([1e3 * seconds for blocks in rounds for seconds in blocks])
    return cls(
      **named,
      start_s=start_s,
      step_ms=step_ms,
      round_ms=tuple(1e3 * statistics.median(blocks) for blocks in rounds),
      images_per_s=1e3 * batch / step_ms.median,
      loss=loss,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PeerReport:
  """Holds all figures; `str()` puts them into words, `to_json()` into a dict for json.dumps."""

  # ---- what ran
  peer: str
  model: str
  overrides: dict[str, Any]
  dialect: str  # words for how our network was fitted to the peer's; "as the recipe says" where it was not
  dtype: str
  num_classes: int
  image_size: int  # pixels a side
  batch: int  # images a step, on one device
  clipping: float | None  # AGC's lambda; None = no AGC
  ema_decay: float | None
  rounds: int
  steps: int  # timed steps a round, on each side
  warmup_steps: int
  # ---- on what
  cpu: str
  cores: int
  date: str  # UTC, ISO 8601
  # ---- what it took
  ours: SideReport
  theirs: SideReport

  @property
  def round_ratios(self) -> tuple[float, ...]:
    """Our milliseconds a step / theirs, the medians of each round."""
    return tuple(our / their for our, their in zip(self.ours.round_ms, self.theirs.round_ms, strict=True))

  @property
  def ratio(self) -> Spread:
    """The spread of `round_ratios` over the rounds; its median is the result."""
    return Spread.of(self.round_ratios)

  def to_json(self) -> dict[str, Any]:
    """Returns all figures by name, ready for json.dumps."""
    return {
      "benchmark": "peers",
      **dataclasses.asdict(self),
      "round_ratios": self.round_ratios,
      "ratio": dataclasses.asdict(self.ratio),
    }

  def __str__(self) -> str:
    ratio, ours, theirs = self.ratio, self.ours, self.theirs
    verdict = "no clear difference" if ratio.minimum <= 1 <= ratio.maximum else "less time" if ratio.median < 1 else "more time"
    clipping = "no AGC" if self.clipping is None else f"AGC {self.clipping:g} on all but the classifier's weight"
    average = "no EMA" if self.ema_decay is None else f"EMA {self.ema_decay:g}"
    lines = [
      ("step of", f"{self.model} ({self.dialect}), {ours.parameters:,} parameters, {self.num_classes} classes, {self.dtype}"),
      ("work", f"uint8 images normalised, forward, backward, {clipping}, SGD with Nesterov momentum and decay, {average}"),
      ("batch", f"{self.batch} images of {self.image_size}×{self.image_size}, on the device from the start"),
      ("device", f"{ours.device} (the peer's name: {theirs.device}); {self.cpu}, {self.cores} cores"),
      *zip(("", "", "", ""), self._table(), strict=True),
      (
        "ours / peer",
        f"× {ratio.median:.3f} the peer's time a step ({verdict}); {ratio.minimum:.3f} to {ratio.maximum:.3f} over {self.rounds} "
        f"round{'s' * (self.rounds > 1)} of {self.steps} step{'s' * (self.steps > 1)} each, by the medians of each",
      ),
      ("checked", f"losses {ours.loss:.4g} and {theirs.loss:.4g} are finite, and both sides have as many parameters"),
      ("ours also", "counts top-1 and top-5, takes the gradients' norm, and looks for numbers that are not finite in every step"),
      ("with", f"ours: {versions_text(ours.versions)}; peer: {versions_text(theirs.versions)}; {self.date}"),
    ]
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label.ljust(width)}  {text}".rstrip() for label, text in lines)

  def _table(self) -> list[str]:
    """The two sides as lines of a table, with its heads and without a line below."""
    rows = [("", "ms a step", "quartiles", "images/s", "start s", "compile s")]
    for name, side in (("ours", self.ours), ("peer", self.theirs)):
      spread = f"{side.step_ms.quartile1:.4g} to {side.step_ms.quartile3:.4g}"
      speed = f"{side.images_per_s:,.1f}", f"{side.start_s:.1f}", f"{side.compile_s:.1f}"
      rows.append((f"{name}: {side.network}", f"{side.step_ms.median:.4g}", spread, *speed))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = (
      "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
      for row in rows
    )
    return [
      first,
      *others,
      "ms a step: median of blocks of steps in a row; start: from the process's start until it is ready, compiling included",
    ]
