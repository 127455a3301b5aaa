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
from nfnets.train.checkpoints import manifest
from nfnets.train.checkpoints.errors import CheckpointError

_LITTER = re.compile(r"\d+(\.orbax-checkpoint-tmp.*|\.deleted)")


def locate(where: str) -> tuple[pathlib.Path, int | None]:
  """(directory of checkpoints, step or None) for a workdir, its `checkpoints` or one step in there.

  Raises CheckpointError for a bucket's URL: appending and renaming need a file system.
  """
  if "://" in where:
    raise CheckpointError(f"{where}: expected a directory; mount the bucket (docs/pods.md says how) and give the path in there")
  path = pathlib.Path(where).resolve()
  if path.name.isdigit() and path.parent.name == "checkpoints":
    return path.parent, int(path.name)
  return (path if path.name == "checkpoints" else path / "checkpoints"), None


def steps(directory: pathlib.Path) -> list[int]:
  """Steps that have a directory, finished or not, ascending."""
  return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit()) if directory.is_dir() else []


def kept(manifests: Iterable[dict[str, Any]], *, newest: int, every: float = 0.0, best: str = "") -> dict[int, list[str]]:
  """The steps to keep, each with the reasons out of "newest", "every" and "best".

  newest: how many. every: the first of each so many epochs stays for ever (0 = none). best: a metric, e.g. "ema_top1"; the
  smallest where it is a loss, else the largest.
  """
  manifests = sorted(manifests, key=lambda one: one["step"])
  reasons: dict[int, list[str]] = {one["step"]: ["newest"] for one in manifests[-newest:]}
  periods = {}
  for one in manifests if every else ():
    periods.setdefault(int(one["epoch"] / every + 1e-9), one["step"])
  for period, step in periods.items():
    if period:
      reasons.setdefault(step, []).append("every")
  sign = -1 if best.endswith("loss") else 1
  scores = [
    (sign * one["metrics"][best], one["step"]) for one in manifests if math.isfinite((one["metrics"] or {}).get(best, math.nan))
  ]
  if scores:
    reasons.setdefault(max(scores)[1], []).append("best")
  return reasons


def remove(path: pathlib.Path) -> None:
  """Deletes a directory of checkpoints' entry; killed on the way, it leaves nothing that counts as one."""
  doomed = path
  if path.name.isdigit():
    doomed = path.with_name(f"{path.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    sync_directory(path.parent)
  shutil.rmtree(doomed)


def set_aside(path: pathlib.Path) -> pathlib.Path:
  """Renames a step so that it counts no more but is still there to be looked at; its new path."""
  aside = path.with_name(f"{path.name}.aside")
  shutil.rmtree(aside, ignore_errors=True)
  path.rename(aside)
  sync_directory(path.parent)
  return aside


def litter(directory: pathlib.Path) -> list[pathlib.Path]:
  """What killed saves and deletions left behind.

  A directory without manifest is such where another has one, or where the run had finished none before it; else manifests that
  were there are gone, and something else is wrong. What an older nfnets wrote, without any, is left alone.
  """
  left = [path for path in directory.iterdir() if _LITTER.fullmatch(path.name)]
  found = [directory / str(step) for step in steps(directory)]
  bare = [path for path in found if not (path / manifest.NAME).exists()]
  if len(bare) < len(found):
    return left + [path for path in bare if (manifest.read_meta(path) or {"schema": manifest.SCHEMA}).get("schema")]
  first = all((manifest.read_meta(path) or {}).get("previous_step", 0) is None for path in bare)
  return left + (bare if first else [])
