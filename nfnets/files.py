"""Writes files so that a reader, or the next run after a crash, finds the old content or the whole new one. Knows no formats."""

import contextlib
import errno
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """A new file to write to, which takes the place of `path` at the end, once its bytes and its name are on the disk.

  After a crash at any moment the old file or the whole new one is there. Where the body raises, the old one stays. The
  temporary name is unique, so that several processes may write the same path at the same time; the last one wins.

  Raises OSError.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
  try:
    with open(temporary, "xb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)
  finally:
    temporary.unlink(missing_ok=True)


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
  """Makes or replaces a small file, see `whole_file`."""
  with whole_file(path) as file:
    file.write(content)


def remove_unfinished(directory: str | os.PathLike[str]) -> None:
  """Deletes the temporary files that killed writers left in a directory; nobody may be writing there."""
  for path in pathlib.Path(directory).glob(".*.tmp"):
    path.unlink(missing_ok=True)


def sync_directory(path: str | os.PathLike[str]) -> None:
  """Brings a directory's names to the disk; nothing where its file system has no such thing (some network ones)."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.ENOTSUP):
      raise
  finally:
    os.close(handle)
