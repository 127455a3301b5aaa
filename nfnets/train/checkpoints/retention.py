"""Which checkpoints a workdir has, which are kept, and what is left over from killed writes.

Needs no jax: programs that only look at checkpoints start at once.
"""

import math
import pathlib
import re
import shutil
from collections.abc import Iterable
from typing import Any

from nfnets.files import sync_directory
from nfnets.train.checkpoints import manifest, schema
from nfnets.train.checkpoints.errors import CheckpointError

_STEP = re.compile(r"0|[1-9]\d{0,9}", re.ASCII)  # as the writer makes them: no 007, and no more digits than an int32 has
_UNFINISHED = re.compile(r"\d+(\.orbax-checkpoint-tmp.*|\.deleted)", re.ASCII)


def locate(path: str) -> tuple[pathlib.Path, int | None]:
  """(directory of checkpoints, step or None) for a workdir, its `checkpoints` or one step in there.

  Raises:
    CheckpointError: a bucket's URL; appending and renaming need a file system.
  """
  if "://" in path:
    raise CheckpointError(f"{path}: expected a directory; mount the bucket (docs/pods.md says how) and give the path in there")
  resolved = pathlib.Path(path).resolve()
  step = step_of(resolved.name)
  if step is not None and resolved.parent.name == "checkpoints":
    return resolved.parent, step
  return (resolved if resolved.name == "checkpoints" else resolved / "checkpoints"), None


def steps(directory: pathlib.Path) -> list[int]:
  """Steps that have a directory, finished or not, ascending."""
  names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
  return sorted(step for step in map(step_of, names) if step is not None)


def step_of(name: str) -> int | None:
  """The step that a directory's name says, None where it is no step's."""
  return int(name) if _STEP.fullmatch(name) and int(name) < schema.STEPS else None


def finished_steps(directory: pathlib.Path) -> list[int]:
  """Steps that have a manifest, ascending; no file is hashed."""
  return [step for step in steps(directory) if manifest.readable(directory / str(step)) is not None]


def period(epoch: float, every: float) -> int:
  """How many whole periods of `every` epochs have passed at `epoch`; what is due once a period is due where this grows."""
  return int(epoch / every + 1e-9)


def kept(manifests: Iterable[dict[str, Any]], *, newest: int, every: float = 0.0, best: str = "") -> dict[int, list[str]]:
  """The steps to keep, each with the reasons out of "newest", "every" and "best".

  Args:
    manifests: of all finished steps.
    newest: how many of the newest stay.
    every: the first step of each so many epochs stays for ever; 0 = none.
    best: a metric, e.g. "ema_top1"; the step with the smallest one stays where it is a loss, else with the largest.
  """
  manifests = sorted(manifests, key=lambda body: body["step"])
  reasons: dict[int, list[str]] = {body["step"]: ["newest"] for body in manifests[-newest:]}
  first_of_period: dict[int, int] = {}
  for body in manifests if every else ():
    first_of_period.setdefault(period(body["epoch"], every), body["step"])
  for number, step in first_of_period.items():
    if number:
      reasons.setdefault(step, []).append("every")
  best_of_all = _best(manifests, best)
  if best_of_all is not None:
    reasons.setdefault(best_of_all, []).append("best")
  return reasons


def best_step(directory: pathlib.Path, asked: int | None = None) -> int:
  """The finished step whose evaluation was the best, by config.keep_best of the run; else by "ema_top1", or by "top1".

  asked: a step that was named too, which is a mistake.

  Raises:
    CheckpointError: no step has an evaluation with that metric, or a step was named.
  """
  if asked is not None:
    raise CheckpointError(f"--best and step {asked}: expected a workdir with --best, or a step without it")
  bodies = [body for step in steps(directory) if (body := manifest.readable(directory / str(step)))]
  wanted = [bodies[-1]["keep"].get("best")] if bodies and bodies[-1]["keep"].get("best") else ["ema_top1", "top1"]
  for metric in wanted:
    step = _best(bodies, metric)
    if step is not None:
      return step
  raise CheckpointError(f"--best: no checkpoint in {directory} has an evaluation with {' or '.join(wanted)}; see `list`")


def _best(manifests: list[dict[str, Any]], metric: str) -> int | None:
  """The step with the largest value of a metric, or the smallest where it is a loss; None if no step has one."""
  sign = -1 if metric.endswith("loss") else 1
  values = [((body["metrics"] or {}).get(metric, math.nan), body["step"]) for body in manifests]
  scores = [(sign * value, step) for value, step in values if math.isfinite(value)]
  return max(scores)[1] if scores else None


def remove(path: pathlib.Path) -> None:
  """Deletes a step, or what is left of one; killed half-way, this leaves nothing that counts as a checkpoint."""
  doomed = path
  if step_of(path.name) is not None:
    doomed = path.with_name(f"{path.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    sync_directory(path.parent)
  shutil.rmtree(doomed)


def set_aside(path: pathlib.Path) -> pathlib.Path:
  """Renames a step so that it no longer counts but can still be looked at; returns its new path."""
  aside = path.with_name(f"{path.name}.aside")
  shutil.rmtree(aside, ignore_errors=True)
  path.rename(aside)
  sync_directory(path.parent)
  return aside


def litter(directory: pathlib.Path) -> list[pathlib.Path]:
  """What killed saves and deletions left behind.

  A step without manifest is litter if another step has one, or if the run had finished none before it. Otherwise manifests
  that were there are gone, and something else is wrong. What an older nfnets wrote, without any manifest, is left alone.
  """
  unfinished = [path for path in directory.iterdir() if _UNFINISHED.fullmatch(path.name)]
  all_steps = [directory / str(step) for step in steps(directory)]
  bare = [path for path in all_steps if not (path / manifest.NAME).exists()]
  if len(bare) < len(all_steps):
    return unfinished + [path for path in bare if (manifest.unchecked_meta(path) or {"schema": manifest.SCHEMA}).get("schema")]
  first_of_run = all(manifest.unchecked_meta(path).get("previous_step", 0) is None for path in bare)
  return unfinished + (bare if first_of_run else [])
