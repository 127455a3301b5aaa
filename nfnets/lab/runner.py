"""Runs experiments one after the other, keeps each as soon as it is done, and goes on where it was stopped."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from nfnets.files import write_file
from nfnets.lab import drawing, records, report
from nfnets.lab.experiment import Experiment, Settings, conclude
from nfnets.lab.progress import Progress


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
  """How far a run is.

  Attributes:
    name: of the experiment that runs.
    number, count: it is number `number` of `count`, from 1.
    share: how much of it is done, 0 to 1.
    left_s: seconds until all are done, by the time that they typically take and by what was needed so far.
    record: the finished experiment's record, else None.
    kept: whether that record lay there already.
  """

  name: str
  number: int
  count: int
  share: float
  left_s: float
  record: dict[str, Any] | None = None
  kept: bool = False


def run(
  experiments: Sequence[Experiment],
  settings: Settings,
  out: pathlib.Path,
  tell: Callable[[Step], None],
  *,
  again: bool = False,
  options: str = "",
) -> list[dict[str, Any]]:
  """Runs experiments and writes NAME.png, NAME.json and report.html into `out`, which exists.

  An experiment whose NAME.json is of the same settings, criteria and code, and whose picture is there, is not computed again.

  Args:
    experiments: in the order in which they are run.
    settings: the same for all.
    out: a directory. The report has a page for every record that lies in it.
    tell: is called with each step.
    again: computes everything again.
    options: what chose the images, for the command that the report shows.

  Returns:
    The records.

  Raises:
    OSError: a file cannot be written.
  """
  clock, results = _Clock(experiments), []
  for number, experiment in enumerate(experiments, start=1):
    file = out / f"{experiment.name}.json"
    stored = records.read(file)
    kept = not again and records.agrees(stored, experiment, settings) and file.with_suffix(".png").is_file()
    clock.begin(experiment)

    def progress(share: float, name: str = experiment.name, number: int = number) -> None:
      tell(Step(name=name, number=number, count=len(experiments), share=share, left_s=clock.left(share)))

    if not kept:
      progress(0.0)
      stored = _compute(experiment, settings, file, progress, again, options)
    clock.end(counted=not kept)
    assert stored is not None
    results.append(stored)
    report.write(out)
    tell(
      Step(
        name=experiment.name, number=number, count=len(experiments), share=1.0, left_s=clock.left(0.0), record=stored, kept=kept
      )
    )
  return results


def _compute(
  experiment: Experiment, settings: Settings, file: pathlib.Path, progress: Callable[[float], None], again: bool, options: str
) -> dict[str, Any]:
  """Runs an experiment and writes its picture, then its record, which says that it is done.

  Till then its parts lie in NAME.parts, from which a stopped run goes on; afterwards in NAME.jsonl, for who wants to see them.
  """
  began = time.monotonic()
  parts, identity = file.with_suffix(".parts"), json.dumps(records.identity(experiment, settings))
  if again or not parts.is_file() or parts.read_text(encoding="utf-8").split("\n", 1)[0] != identity:
    write_file(parts, identity.encode())
  measured = experiment.run(settings, Progress(progress, parts))
  result = conclude(experiment, settings, measured)
  write_file(file.with_suffix(".png"), drawing.render(measured.draw))
  record = records.record(result, time.monotonic() - began, options)
  write_file(file, json.dumps(record, indent=1, ensure_ascii=False).encode())
  parts.replace(file.with_suffix(".jsonl"))
  return record


class _Clock:
  """Estimates the time left: what is to come takes its typical time, times how much slower this machine was so far."""

  def __init__(self, experiments: Sequence[Experiment]):
    self._to_come = sum(60 * experiment.minutes for experiment in experiments)
    self._typical, self._took, self._began, self._now = 0.0, 0.0, 0.0, 0.0

  def begin(self, experiment: Experiment) -> None:
    self._now, self._began = 60 * experiment.minutes, time.monotonic()
    self._to_come -= self._now

  def end(self, *, counted: bool) -> None:
    if counted:
      self._typical += self._now
      self._took += time.monotonic() - self._began
    self._now, self._began = 0.0, time.monotonic()

  def left(self, share: float) -> float:
    """Seconds left when this share of the present experiment is done."""
    elapsed = time.monotonic() - self._began
    typical, took = self._typical + share * self._now, self._took + (elapsed if share else 0.0)
    slower = took / typical if typical > 1 else 1.0
    return max(0.0, slower * ((1 - share) * self._now + self._to_come))
