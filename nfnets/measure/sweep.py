"""Our step beside timm's on one device at several batch sizes, each side's best against the other's, within a given time.

It is made for a GPU that is at hand for minutes: a check of the step in its dtype comes first, then batch sizes from small to
large until memory ends, then timm's network compiled by torch.compile and in the other layout of memory, at its best batch. Both
sides start at the same time, and ours keeps its compiled programs for the stages that follow. Networks share the time evenly; a
stage that would begin too late is left out, and said to be; what was measured lies in the file after each stage.
"""

import dataclasses
import functools
import json
import math
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from nfnets.config import Config
from nfnets.errors import UserError
from nfnets.files import write_file
from nfnets.measure import check, peers, program
from nfnets.measure.check import Check
from nfnets.measure.turns import Side
from nfnets.train.checkpoints.compatibility import to_json

FIRST_GUESS_S = 90.0  # of a stage, before one has been timed


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
  """One comparison.

  Attributes:
    model, batch: what ran.
    way: how timm's network ran: "eager", "compiled" or "contiguous", which has its layout of memory.
    ours, theirs: images/s; NaN where it failed.
    words: why it failed, or was left out; empty if it ran.
  """

  model: str
  batch: int
  way: str
  ours: float = float("nan")
  theirs: float = float("nan")
  words: str = ""


def sweep(
  configs: Sequence[Config],
  *,
  batches: Sequence[int],
  minutes: float,
  steps: int,
  rounds: int,
  file: pathlib.Path | None,
  say: Callable[[str], None],
) -> dict[str, Any]:
  """Runs all stages.

  Args:
    configs: a run for each network.
    batches: images a step, from small to large.
    minutes: for all; no stage begins that would end later than its network's share, judged by the longest so far.
    steps, rounds: of each comparison, see `peers.compare`.
    file: gets the report after each stage; None: nowhere.
    say: gets a line as things happen.

  Returns:
    {"checks", "trials", "best"}, ready for JSON; `best` has each network's best batch and images/s on each side.

  Raises:
    UserError: timm is missing, or has no such network.
    OSError: the file cannot be written.
  """
  peers.check_installed("timm")
  for config in configs:
    peers.timm_network(config)
  begin, stages = time.monotonic(), Stages(file, say)
  with tempfile.TemporaryDirectory(prefix="nfnets-compiled-") as kept:
    for number, config in enumerate(configs, 1):
      stages.end = begin + 60 * minutes * number / len(configs)
      stages.check(config)
      compare = functools.partial(stages.compare, config, steps=steps, rounds=rounds, kept=kept)
      for batch in batches:
        if compare(batch=batch, way="eager").words:
          break
      if best := stages.best(config.model.name):
        compare(batch=best["theirs"]["batch"], way="compiled")
        compare(batch=best["theirs"]["batch"], way="contiguous")
  return stages.report()


class Stages:
  """What was measured so far, and the time that is left."""

  def __init__(self, file: pathlib.Path | None, say: Callable[[str], None]):
    self.end, self._longest = math.inf, 0.0  # by time.monotonic(); seconds
    self._file, self._say = file, say
    self.checks: list[Check] = []
    self.trials: list[Trial] = []
    self.details: list[dict[str, Any]] = []

  def check(self, config: Config) -> None:
    """Compares a step in the configuration's dtype with one in float32."""
    if time.monotonic() + (self._longest or FIRST_GUESS_S) > self.end:
      self._say(f"{config.model.name}: the check of {config.model.dtype} is left out: no time was left")
      return
    job = {"config": to_json(config)}
    with peers.explained(), Side("check", check.__file__, job, environment=peers.our_environment()) as side:
      self.checks.append(Check(**side.facts))
    last = self.checks[-1]
    verdict = "right" if last.right else "WRONG"
    losses = f"loss {last.loss:.4g}, in float32 {last.loss_float32:.4g}"
    self._say(f"{last.model}, {last.dtype}: {losses}; cosine of the updates {last.cosine:.4f}: {verdict}")
    self._write()

  def compare(self, config: Config, *, batch: int, way: str, steps: int, rounds: int, kept: str) -> Trial:
    """Compares with timm's network in one way, if there is time; `kept` is the directory of our compiled programs."""
    begin, trial = time.monotonic(), Trial(model=config.model.name, batch=batch, way=way)
    if begin + (self._longest or FIRST_GUESS_S) > self.end:
      trial = dataclasses.replace(trial, words="left out: no time was left")
    else:
      sides = {"torch_compile": way == "compiled", "torch_contiguous": way == "contiguous"}
      counts = {"steps": steps, "rounds": rounds}
      try:
        found = peers.compare(dataclasses.replace(config, batch=batch), "timm", **counts, **sides, together=True, kept=kept)
        trial = dataclasses.replace(trial, ours=found.ours.images_per_s, theirs=found.theirs.images_per_s)
        self.details.append({"way": way, **found.to_json()})
      except UserError as error:
        trial = dataclasses.replace(trial, words=str(error))
    self.trials.append(trial)
    said = trial.words or f"ours {trial.ours:,.0f} images/s, timm {trial.theirs:,.0f}: × {trial.ours / trial.theirs:.2f}"
    self._say(f"{trial.model}, batch {trial.batch}, timm {way}: {said}")
    self._longest = max(self._longest, time.monotonic() - begin)
    self._write()
    return trial

  def best(self, model: str) -> dict[str, Any] | None:
    """The best batch and way of each side, and the ratio of their images/s; None if nothing ran."""
    ran = [trial for trial in self.trials if trial.model == model and not trial.words]
    if not ran:
      return None
    ours, theirs = max(ran, key=lambda trial: trial.ours), max(ran, key=lambda trial: trial.theirs)
    return {
      "ours": {"batch": ours.batch, "images_per_s": ours.ours},
      "theirs": {"batch": theirs.batch, "way": theirs.way, "images_per_s": theirs.theirs},
      "ratio": ours.ours / theirs.theirs,
    }

  def report(self) -> dict[str, Any]:
    """Everything, ready for JSON."""
    names = list(dict.fromkeys(trial.model for trial in self.trials))
    return {
      "benchmark": "sweep",
      "device": self.details[0]["ours"]["device"] if self.details else None,
      "versions": program.versions(),
      "checks": [{**dataclasses.asdict(check), "right": check.right} for check in self.checks],
      "trials": [{key: None if value != value else value for key, value in dataclasses.asdict(t).items()} for t in self.trials],
      "best": {name: self.best(name) for name in names},
      "details": self.details,
    }

  def _write(self) -> None:
    if self._file is not None:
      write_file(self._file, json.dumps(self.report(), indent=1).encode())
