"""What makes a directory a checkpoint: a manifest of every file's size and SHA-256, written last.

Needs no jax: programs that only look at checkpoints start at once.
"""

import concurrent.futures
import datetime
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Callable, Iterable
from typing import Any

from nfnets.files import sync_directory, write_file
from nfnets.train.checkpoints.errors import CheckpointError, NewerError, NoManifestError

NAME = "manifest.json"
SCHEMA = 1  # of the manifest and of what lies beside it; counts up when an older nfnets could not read it
_CHUNK = 4 << 20  # bytes read at once
_THREADS = 4  # files hashed at a time; hashing lets other threads run


def write(directory: pathlib.Path, facts: dict[str, Any]) -> dict[str, Any]:
  """Brings all files to the disk, then makes `directory` a checkpoint. facts: what the manifest says beside the files."""
  paths = [path for path in directory.rglob("*") if path.is_file()]
  digests = _map(lambda path: _digest(path, sync=True), paths)
  files = {
    path.relative_to(directory).as_posix(): {"size": size, "sha256": digest}
    for path, (size, digest) in zip(paths, digests, strict=True)
  }
  for path in (*(path for path in directory.rglob("*") if path.is_dir()), directory, directory.parent):
    sync_directory(path)
  body = {"schema": SCHEMA, "saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **facts, "files": files}
  write_file(directory / NAME, _render(body).encode())
  return body


def amend(directory: pathlib.Path, **facts: Any) -> None:
  """Changes what a manifest says beside the files."""
  write_file(directory / NAME, _render(read(directory) | facts).encode())


def read(directory: pathlib.Path) -> dict[str, Any]:
  """The manifest of a checkpoint.

  Raises:
    NoManifestError: there is none. NewerError: a newer nfnets wrote it. CheckpointError: it cannot be read, or is damaged.
  """
  body: Any = None
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


def readable(directory: pathlib.Path) -> dict[str, Any] | None:
  """The manifest, or None where `read` raises."""
  try:
    return read(directory)
  except CheckpointError:
    return None


def verify(directory: pathlib.Path, progress: Callable[[int], None] = lambda count: None, *, hashes: bool = True) -> list[str]:
  """What is wrong with a checkpoint, a line each; empty if it is good.

  Args:
    directory: of the checkpoint.
    progress: gets the number of bytes after each read.
    hashes: read the files as well; without, only their sizes are compared.

  Raises:
    NewerError: a newer nfnets wrote it.
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


def read_meta(path: pathlib.Path) -> dict[str, Any] | None:
  """What a step says of itself beside its arrays, or None where that cannot be read."""
  try:
    return json.loads((path / "meta" / "metadata").read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return None


def _why_none(directory: pathlib.Path) -> str:
  if not directory.is_dir():
    return "is not there"
  if "schema" not in (read_meta(directory) or {"schema": SCHEMA}):
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
