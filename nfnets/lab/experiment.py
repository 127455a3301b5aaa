"""What an experiment is, and what comes out of one: plain data that knows nothing of files, flags or networks."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from nfnets.config import DataConfig
from nfnets.lab import verdict
from nfnets.lab.progress import Progress

Scale = Literal["small", "full"]
Row = dict[str, Any]  # column: text, number, or one number a seed, which the report makes a mean with its interval of


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
  """What a person chooses."""

  # "small" takes at most three minutes on two cores; "full" is for a GPU
  scale: Scale = "small"
  # how often everything is repeated, each time with other weights
  seeds: int = 3
  # a network of the user's own that is measured beside the purpose-made ones, see users.user_model; None: only those
  model: str | None = None
  # the images that networks are trained on; None: scikit-learn's digits
  data: DataConfig | None = None

  @property
  def models(self) -> tuple[str, ...]:
    """The network of the user's own, or nothing."""
    return () if self.model is None else (self.model,)

  @property
  def small(self) -> bool:
    """Whether the scale is "small"."""
    return self.scale == "small"

  def of_scale(self, small: Any, full: Any) -> Any:
    """One of two values, by the scale."""
    return small if self.small else full


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
  """One falsifiable part of a claim: a figure, and the range in which it must lie. It is fixed before anything is measured."""

  # the figure's name, under which `Measured.samples` holds it
  name: str
  # what is claimed, in one sentence
  claim: str
  # the range, both ends included; infinite where it has no end
  low: float = -math.inf
  high: float = math.inf

  def text(self) -> str:
    """The range in words."""
    if math.isinf(self.low):
      return f"at most {self.high:g}"
    return f"at least {self.low:g}" if math.isinf(self.high) else f"from {self.low:g} to {self.high:g}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
  """What `Experiment.run` brings back.

  Attributes:
    samples: for each criterion's name, one number a seed.
    rows: a table for people; all rows have the same columns.
    yours: for the name of each of `Experiment.yours`, one number a seed; empty without a network of the user's own.
    draw: draws the picture into an empty matplotlib Figure.
    caption: what the picture shows, in a sentence or two.
    notes: what a reader must know beside it, a sentence each.
  """

  samples: Mapping[str, Sequence[float]]
  rows: Sequence[Row]
  draw: Callable[[Any], None]
  caption: str
  notes: Sequence[str] = ()
  yours: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
  """A published claim and how it is measured here."""

  # one word, also the names of its files
  name: str
  title: str
  # author, year and number on arXiv
  paper: str
  # section and figure or table of the paper that makes the claim
  section: str
  # the whole claim in one falsifiable sentence
  claim: str
  # its parts; the claim holds if all of them do
  criteria: tuple[Criterion, ...]
  # minutes that it takes at the scale "small" on two cores
  minutes: float
  # what the claim says of a network of the user's own; it is judged for itself and does not count for the claim
  yours: tuple[Criterion, ...] = ()
  run: Callable[[Settings, Progress], Measured]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
  """What was found for one criterion: the figure of each seed, their mean with its interval, and the verdict."""

  criterion: Criterion
  samples: tuple[float, ...]
  interval: verdict.Interval
  verdict: verdict.Verdict


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
  """An experiment's outcome: the measured figures with their intervals, the verdict, the table, and how to draw the picture.

  `yours` are the findings on a network of the user's own, none without one.
  """

  experiment: Experiment
  settings: Settings
  findings: tuple[Finding, ...]
  verdict: verdict.Verdict
  measured: Measured
  yours: tuple[Finding, ...] = ()


def conclude(experiment: Experiment, settings: Settings, measured: Measured) -> Result:
  """Computes intervals and verdicts from what was measured; nothing else can give a verdict.

  Raises:
    KeyError: a criterion's figure was not measured, or something was measured under a name that no criterion has.
  """
  findings = judged(experiment.name, experiment.criteria, measured.samples)
  yours = judged(experiment.name, experiment.yours if settings.models else (), measured.yours)
  whole = verdict.combine([finding.verdict for finding in findings])
  return Result(experiment=experiment, settings=settings, findings=findings, verdict=whole, measured=measured, yours=yours)


def judged(name: str, criteria: Sequence[Criterion], measured: Mapping[str, Sequence[float]]) -> tuple[Finding, ...]:
  """A finding for each criterion of the experiment `name`; raises KeyError as `conclude`."""
  names = {criterion.name for criterion in criteria}
  if names != set(measured):
    raise KeyError(f"{name}: criteria {sorted(names)} differ from what was measured, {sorted(measured)}")
  findings = []
  for criterion in criteria:
    samples = tuple(float(sample) for sample in measured[criterion.name])
    interval = verdict.bootstrap(samples)
    found = verdict.judge(interval, criterion.low, criterion.high)
    findings.append(Finding(criterion=criterion, samples=samples, interval=interval, verdict=found))
  return tuple(findings)
