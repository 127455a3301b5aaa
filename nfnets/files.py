"""Writes files so that a reader, or the next run after a crash, finds the old content or the whole new one."""

import errno
import os
import pathlib


def replace(path: pathlib.Path, content: bytes) -> None:
  """Writes a file so that after a crash at any moment either the old or the whole new one is there."""
  temporary = path.with_name(f"{path.name}.tmp")
  with open(temporary, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
  sync_directory(path.parent)


def sync_directory(path: pathlib.Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems have no such thing
      raise
  finally:
    os.close(handle)
