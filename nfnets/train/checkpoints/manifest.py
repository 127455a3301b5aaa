"""What makes a directory a checkpoint: a manifest of every file's size and SHA-256, written last.

Needs no jax: programs that only look at checkpoints start at once.
"""

import concurrent.futures
import datetime
import hashlib
import json
import os
import pathlib
import stat
import threading
from collections.abc import Callable, Iterable
from typing import Any

from nfnets.files import sync_directory, write_file
from nfnets.train.checkpoints import schema
from nfnets.train.checkpoints.errors import CheckpointError, NewerError, NoManifestError

NAME = "manifest.json"
_META = "meta/metadata"  # Orbax's name for what JsonSave writes as "meta"
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
  try:
    body, text = schema.read_json(directory / NAME)
  except FileNotFoundError:
    raise NoManifestError(_why_none(directory)) from None
  # The file holds its own digest and has one form only, in every schema: no flipped bit goes unseen.
  if not body.pop("sha256", None) or _render(body) != text:
    raise CheckpointError(f"{NAME} is damaged")
  written_as, versions = body.get("schema"), body.get("versions")
  if isinstance(written_as, int) and written_as > SCHEMA:
    version = schema.shown(versions.get("nfnets", "?") if isinstance(versions, dict) else "?")
    raise NewerError(
      f"{directory}: written by nfnets {version}, schema {schema.shown(written_as)}; this is schema {SCHEMA}: update nfnets"
    )
  schema.check(NAME, body, schema.MANIFEST)
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

  root = os.path.realpath(directory)

  def look(item: tuple[str, dict[str, Any]]) -> str | None:
    name, wanted = item
    try:
      path = directory / name
      status = path.lstat()
      if not stat.S_ISREG(status.st_mode) or os.path.realpath(path) != os.path.join(root, name):
        return f"{name} is no file of the checkpoint's own"  # a link to elsewhere, or a pipe, which would be waited for
      size = status.st_size
      if size != wanted["size"]:
        return f"{name} has {size:,} bytes instead of {wanted['size']:,}"
      digest = _digest(path, count)[1] if hashes else wanted["sha256"]
    except FileNotFoundError:
      return f"{name} is missing"
    except OSError as error:
      return f"{name} cannot be read: {error.strerror}"
    return None if digest == wanted["sha256"] else f"{name} is damaged: its SHA-256 is another"

  problems = [problem for problem in _map(look, files.items()) if problem]
  return problems or _problems_of_meta(directory)


def read_meta(directory: pathlib.Path) -> dict[str, Any]:
  """What a step says of itself beside its arrays, as schema.META has it. Raises CheckpointError if it is malformed."""
  try:
    body, _ = schema.read_json(directory / _META)
    schema.check(_META, body, schema.META)
  except FileNotFoundError:
    raise CheckpointError(f"{_META} is missing") from None
  if str(body["step"]) != directory.name:
    raise CheckpointError(f"{_META} holds step {body['step']}, not what the directory's name says")
  return body


def unchecked_meta(directory: pathlib.Path) -> dict[str, Any]:
  """What a step without a manifest says of itself, {} where that cannot be read; nothing in it need be as it should."""
  try:
    return schema.read_json(directory / _META)[0]
  except (OSError, CheckpointError):
    return {}


def _problems_of_meta(directory: pathlib.Path) -> list[str]:
  try:
    read_meta(directory)
  except CheckpointError as error:
    return [str(error)]
  return []


def _why_none(directory: pathlib.Path) -> str:
  if not directory.is_dir():
    return "is not there"
  if "schema" not in (unchecked_meta(directory) or {"schema": SCHEMA}):
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
