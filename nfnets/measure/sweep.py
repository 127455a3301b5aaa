"""Our step beside timm's on one device at several batch sizes, each side's best against the other's, within a given time.

It is made for a GPU that is at hand for minutes: a check of the step in its dtype comes first, then batch sizes from small to
large until memory ends, then timm's network compiled by torch.compile and in the other layout of memory, at its best batch. Each
stage that would begin too late is left out, and said to be; what was measured lies in the file after each stage.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from nfnets import models
from nfnets.config import Config
from nfnets.errors import UserError
from nfnets.files import write_file
from nfnets.measure import peers, program, runs
from nfnets.measure.peers_report import PeerReport
from nfnets.train.step import sharding

CHECK_BATCH = 8
FIRST_GUESS_S = 90.0  # of a stage, before one has been timed
LOSS_TOLERANCE, LEAST_COSINE = 0.02, 0.9  # of a step in bfloat16 against the same one in float32


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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check:
  """One step in the configuration's dtype beside one in float32, from the same weights on the same noise."""

  model: str
  dtype: str
  loss: float
  loss_float32: float
  cosine: float  # of the two updates of all parameters

  @property
  def right(self) -> bool:
    close = abs(self.loss - self.loss_float32) <= LOSS_TOLERANCE * abs(self.loss_float32)
    return close and self.cosine >= LEAST_COSINE


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
    minutes: no stage begins that would end later, judged by the longest so far.
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
  stages = Stages(minutes, file, say)
  for config in configs:
    peers.timm_network(config)
  for config in configs:
    stages.check(config)
    compare = lambda batch, way, config=config: stages.compare(dataclasses.replace(config, batch=batch), way, steps, rounds)
    for batch in batches:
      if compare(batch, "eager").words:
        break
    if best := stages.best(config.model.name):
      compare(best["theirs"]["batch"], "compiled")
      compare(best["theirs"]["batch"], "contiguous")
  return stages.report()


class Stages:
  """What was measured so far, and the time that is left."""

  def __init__(self, minutes: float, file: pathlib.Path | None, say: Callable[[str], None]):
    self._end, self._longest = time.monotonic() + 60 * minutes, 0.0
    self._file, self._say = file, say
    self.checks: list[Check] = []
    self.trials: list[Trial] = []
    self.details: list[dict[str, Any]] = []

  def check(self, config: Config) -> None:
    """Compares a step in the configuration's dtype with one in float32."""
    begin = time.monotonic()
    self.checks.append(check_step(config))
    last = self.checks[-1]
    verdict = "right" if last.right else "WRONG"
    losses = f"loss {last.loss:.4g}, in float32 {last.loss_float32:.4g}"
    self._say(f"{last.model}, {last.dtype}: {losses}; cosine of the updates {last.cosine:.4f}: {verdict}")
    self._ended(begin)

  def compare(self, config: Config, way: str, steps: int, rounds: int) -> Trial:
    """Compares with timm's network in one way, if there is time."""
    begin, trial = time.monotonic(), Trial(model=config.model.name, batch=config.batch, way=way)
    if begin + (self._longest or FIRST_GUESS_S) > self._end:
      trial = dataclasses.replace(trial, words="left out: no time was left")
    else:
      try:
        found: PeerReport = peers.compare(
          config, "timm", rounds=rounds, steps=steps, torch_compile=way == "compiled", torch_contiguous=way == "contiguous"
        )
        trial = dataclasses.replace(trial, ours=found.ours.images_per_s, theirs=found.theirs.images_per_s)
        self.details.append({"way": way, **found.to_json()})
      except UserError as error:
        trial = dataclasses.replace(trial, words=str(error))
    self.trials.append(trial)
    said = trial.words or f"ours {trial.ours:,.0f} images/s, timm {trial.theirs:,.0f}: × {trial.ours / trial.theirs:.2f}"
    self._say(f"{trial.model}, batch {trial.batch}, timm {way}: {said}")
    self._ended(begin)
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
      "device": jax.devices()[0].device_kind,
      "versions": program.versions(),
      "checks": [{**dataclasses.asdict(check), "right": check.right} for check in self.checks],
      "trials": [{key: None if value != value else value for key, value in dataclasses.asdict(t).items()} for t in self.trials],
      "best": {name: self.best(name) for name in names},
      "details": self.details,
    }

  def _ended(self, begin: float) -> None:
    self._longest = max(self._longest, time.monotonic() - begin)
    if self._file is not None:
      write_file(self._file, json.dumps(self.report(), indent=1).encode())


def check_step(config: Config) -> Check:
  """Takes a step in the configuration's dtype and the same in float32, of CHECK_BATCH images, with what is random left out."""
  size = config.data.image_size or models.variant(config.model.name).train_resolution
  classes, _ = program.class_count(config)
  mesh = sharding.make_mesh(jax.devices()[:1])
  found = {}
  for dtype in (config.model.dtype, "float32"):
    model = dataclasses.replace(config.model, dtype=dtype, drop_rate=0.0, stochastic_depth=0.0)
    # The first learning rate of a warm-up is 0, with which nothing would move.
    optim = dataclasses.replace(config.optim, warmup_epochs=0, agc_track=False)
    changed = dataclasses.replace(config, model=model, optim=optim, batch=CHECK_BATCH)
    with runs.explained_out_of_memory(CHECK_BATCH, size, mesh.devices.flat[0].device_kind):
      ready = runs.prepare(changed, mesh, size, classes)
      before = jax.tree.map(np.asarray, ready.run.state.params)
      ready.run.seconds_per_step(1)
    moved = jax.tree.map(lambda after, start: np.asarray(after, np.float64) - start, ready.run.state.params, before)
    found[dtype] = ready.run.check(), np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(moved)])
  (loss, update), (loss_float32, update_float32) = found[config.model.dtype], found["float32"]
  sizes = np.linalg.norm(update) * np.linalg.norm(update_float32)
  cosine = float(update @ update_float32 / sizes) if sizes else float("nan")
  return Check(model=config.model.name, dtype=config.model.dtype, loss=loss, loss_float32=loss_float32, cosine=cosine)
