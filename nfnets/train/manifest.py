"""What makes a directory a checkpoint: a manifest of every file's size and SHA-256, written last; which are kept; what is litter.

Needs no jax: programs that only look at checkpoints start at once.
"""
import concurrent.futures
import datetime
import errno
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from typing import Any

NAME = "manifest.json"
SCHEMA = 1  # of the manifest and of what lies beside it; counts up when an older nfnets could not read it
_CHUNK = 4 << 20  # bytes read at once
_THREADS = 4  # SHA-256 lets other threads run
_LITTER = re.compile(r"\d+(\.orbax-checkpoint-tmp.*|\.deleted)")


class CheckpointError(ValueError):
  """There is no good checkpoint, or it is not one of this configuration's; the message says what is wrong or differs."""


class SaveError(OSError):
  """The last checkpoint of a run could not be written."""


class NoManifestError(CheckpointError):
  """The directory was never finished, or its manifest is lost."""


class NewerError(CheckpointError):
  """A newer nfnets wrote it."""


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


def write(directory: pathlib.Path, facts: dict[str, Any]) -> dict[str, Any]:
  """Brings all files to the disk, then makes `directory` a checkpoint. `facts`: what to say of it beside the files; as JSON."""
  paths = [path for path in directory.rglob("*") if path.is_file()]
  found = _map(lambda path: _digest(path, sync=True), paths)
  files = {path.relative_to(directory).as_posix(): {"size": size, "sha256": digest}
           for path, (size, digest) in zip(paths, found, strict=True)}
  for path in (*(path for path in directory.rglob("*") if path.is_dir()), directory, directory.parent):
    _sync_directory(path)
  body = {"schema": SCHEMA, "saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **facts, "files": files}
  replace(directory / NAME, _render(body).encode())
  return body


def amend(directory: pathlib.Path, **facts: Any) -> None:
  """Changes what a manifest says beside the files."""
  replace(directory / NAME, _render(read(directory) | facts).encode())


def replace(path: pathlib.Path, content: bytes) -> None:
  """Writes a file so that after a crash at any moment either the old or the whole new one is there."""
  temporary = path.with_name(f"{path.name}.tmp")
  with open(temporary, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
  _sync_directory(path.parent)


def read(directory: pathlib.Path) -> dict[str, Any]:
  """The manifest. Raises CheckpointError, or one of its kinds, that says in a line why there is none to rely on."""
  try:
    text = (directory / NAME).read_bytes().decode()
    body = json.loads(text)
    # The file holds its own digest and has one form only, in every schema: no flipped bit goes unseen.
    same = isinstance(body, dict) and body.pop("sha256", None) and _render(body) == text
  except FileNotFoundError:
    raise NoManifestError(_why_none(directory)) from None
  except OSError as error:
    raise CheckpointError(f"{NAME} cannot be read: {error.strerror}") from error
  except ValueError:
    same = False
  if not same:
    raise CheckpointError(f"{NAME} is damaged")
  if body["schema"] > SCHEMA:
    version = body.get("versions", {}).get("nfnets", "?")
    raise NewerError(f"{directory}: written by nfnets {version}, schema {body['schema']}; this is schema {SCHEMA}: update nfnets")
  if str(body["step"]) != directory.name:
    raise CheckpointError(f"holds step {body['step']}, not what its name says")
  return body


def verify(directory: pathlib.Path, progress: Callable[[int], None] = lambda count: None, *, hashes: bool = True) -> list[str]:
  """What is wrong with a checkpoint, a line each; nothing if it is good. `progress` gets the numbers of bytes read.

  hashes: read the files as well; without, only their sizes are looked at. Raises NewerError.
  """
  try:
    files = read(directory)["files"]
  except NewerError:
    raise
  except CheckpointError as error:
    return [str(error)]

  lock = threading.Lock()

  def count(size: int) -> None:
    with lock:
      progress(size)

  def look(item: tuple[str, dict[str, Any]]) -> str | None:
    name, wanted = item
    try:
      size = (directory / name).stat().st_size
      if size != wanted["size"]:
        return f"{name} has {size:,} bytes instead of {wanted['size']:,}"
      digest = _digest(directory / name, count)[1] if hashes else wanted["sha256"]
    except FileNotFoundError:
      return f"{name} is missing"
    except OSError as error:
      return f"{name} cannot be read: {error.strerror}"
    return None if digest == wanted["sha256"] else f"{name} is damaged: its SHA-256 is another"
  return [problem for problem in _map(look, files.items()) if problem]


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
  scores = [(sign * one["metrics"][best], one["step"]) for one in manifests
            if math.isfinite((one["metrics"] or {}).get(best, math.nan))]
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
    _sync_directory(path.parent)
  shutil.rmtree(doomed)


def set_aside(path: pathlib.Path) -> pathlib.Path:
  """Renames a step so that it counts no more but is still there to be looked at; its new path."""
  aside = path.with_name(f"{path.name}.aside")
  shutil.rmtree(aside, ignore_errors=True)
  path.rename(aside)
  _sync_directory(path.parent)
  return aside


def litter(directory: pathlib.Path) -> list[pathlib.Path]:
  """What killed saves and deletions left behind.

  A directory without manifest is such where another has one, or where the run had finished none before it; else manifests that
  were there are gone, and something else is wrong. What an older nfnets wrote, without any, is left alone.
  """
  left = [path for path in directory.iterdir() if _LITTER.fullmatch(path.name)]
  found = [directory / str(step) for step in steps(directory)]
  bare = [path for path in found if not (path / NAME).exists()]
  if len(bare) < len(found):
    return left + [path for path in bare if (_meta(path) or {"schema": SCHEMA}).get("schema")]
  first = all((_meta(path) or {}).get("previous_step", 0) is None for path in bare)
  return left + (bare if first else [])


def _meta(path: pathlib.Path) -> dict[str, Any] | None:
  try:
    return json.loads((path / "meta" / "metadata").read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return None


def _why_none(directory: pathlib.Path) -> str:
  if not directory.is_dir():
    return "is not there"
  if "schema" not in (_meta(directory) or {"schema": SCHEMA}):
    return f"has no {NAME} and no schema: an older nfnets wrote it; use that version, or train anew in another workdir"
  return f"has no {NAME}: unfinished, or the file is lost"


def _render(body: dict[str, Any]) -> str:
  digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
  return json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _map(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(function, items))


def _digest(path: pathlib.Path, progress: Callable[[int], None] = lambda count: None, *, sync: bool = False) -> tuple[int, str]:
  """(bytes, SHA-256 in hexadecimal)."""
  digest, size = hashlib.sha256(), 0
  with open(path, "rb", buffering=0) as file:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
      size += len(chunk)
      progress(len(chunk))
    if sync:
      os.fsync(file.fileno())
  return size, digest.hexdigest()


def _sync_directory(path: pathlib.Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems have no such thing
      raise
  finally:
    os.close(handle)
