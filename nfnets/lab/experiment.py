"""What an experiment is, and what comes out of one: plain data that knows nothing of flags or networks."""

import concurrent.futures
import dataclasses
import json
import math
import pathlib
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from nfnets.config import DataConfig
from nfnets.data.batches.prefetch import cores
from nfnets.lab import verdict

Scale = Literal["small", "full"]
Row = dict[str, Any]  # column: text or number


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
  """What a person chooses."""

  # "small" takes at most three minutes on two cores; "full" is for a GPU
  scale: Scale = "small"
  # how often everything is repeated, each time with other weights
  seeds: int = 3
  # a network of the user's own that is measured beside the purpose-made ones, see task.user_model; None: only those
  model: str | None = None
  # the images that networks are trained on; None: scikit-learn's digits
  data: DataConfig | None = None

  def of_scale(self, small: Any, full: Any) -> Any:
    """One of two values, by the scale."""
    return small if self.scale == "small" else full


class Progress:
  """Hears from an experiment how far it is, and does its independent parts, each of which is kept as soon as it is done.

  Args:
    tell: is called with the share that is done, 0 to 1.
    file: where values of parts are kept, a line of JSON each, and read from; None: nowhere.
  """

  def __init__(self, tell: Callable[[float], None], file: pathlib.Path | None = None):
    self._tell, self._file, self._writing = tell, file, threading.Lock()

  def __call__(self, share: float) -> None:
    self._tell(share)

  def parts(self, jobs: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Computes {name: value} of all jobs; a value that the file holds is not computed again.

    On CPUs several jobs run at once, one a core, since networks of this size keep no more busy. Values must be such that JSON
    can hold them.
    """
    values = {name: value for name, value in self._kept().items() if name in jobs}
    left, workers = [name for name in jobs if name not in values], cores() if jax.default_backend() == "cpu" else 1
    random.Random(0).shuffle(left)  # neighbours often share a program, which two threads would both compile

    def work(name: str) -> tuple[str, Any]:
      value = jobs[name]()
      if self._file is not None:
        with self._writing, self._file.open("a", encoding="utf-8") as file:
          file.write("\n" + json.dumps({"part": name, "value": value}))  # first the end of a line that a killed run left
      return name, value

    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
      for done in concurrent.futures.as_completed([pool.submit(work, name) for name in left]):
        values.update([done.result()])
        self(len(values) / len(jobs))
    finally:
      pool.shutdown(cancel_futures=True)
    return {name: values[name] for name in jobs}

  def _kept(self) -> dict[str, Any]:
    """What the file holds; a line that a killed run left unfinished is no part."""
    values = {}
    for line in self._file.read_text(encoding="utf-8").splitlines() if self._file and self._file.is_file() else ():
      try:
        part = json.loads(line)
        values[part["part"]] = part["value"]
      except (ValueError, KeyError, TypeError):
        continue
    return values


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
    draw: draws the picture into an empty matplotlib Figure.
    caption: what the picture shows, in a sentence or two.
    notes: what a reader must know beside it, a sentence each.
  """

  samples: Mapping[str, Sequence[float]]
  rows: Sequence[Row]
  draw: Callable[[Any], None]
  caption: str
  notes: Sequence[str] = ()


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
  """An experiment's outcome: the measured figures with their intervals, the verdict, the table, and how to draw the picture."""

  experiment: Experiment
  settings: Settings
  findings: tuple[Finding, ...]
  verdict: verdict.Verdict
  measured: Measured


def conclude(experiment: Experiment, settings: Settings, measured: Measured) -> Result:
  """Computes intervals and verdicts from what was measured; nothing else can give a verdict.

  Raises:
    KeyError: a criterion's figure was not measured, or something was measured under a name that no criterion has.
  """
  names = {criterion.name for criterion in experiment.criteria}
  if names != set(measured.samples):
    raise KeyError(f"{experiment.name}: criteria {sorted(names)} differ from what was measured, {sorted(measured.samples)}")
  findings = []
  for criterion in experiment.criteria:
    samples = tuple(float(sample) for sample in measured.samples[criterion.name])
    interval = verdict.bootstrap(samples)
    judged = verdict.judge(interval, criterion.low, criterion.high)
    findings.append(Finding(criterion=criterion, samples=samples, interval=interval, verdict=judged))
  whole = verdict.combine([finding.verdict for finding in findings])
  return Result(experiment=experiment, settings=settings, findings=tuple(findings), verdict=whole, measured=measured)
