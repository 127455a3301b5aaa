"""Reads files that may be anything: a pipe, a device, or far too large. They are refused instead of waited for."""

import errno
import os
import stat

# A pipe that nobody writes to is opened at once instead of waited for; for regular files it makes no difference.
READ_ONLY = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


def read_regular(path: str, largest: int) -> bytes:
  """Returns the content of a regular file, or of one that links lead to, of at most `largest` bytes. Raises OSError."""
  descriptor = os.open(path, READ_ONLY)
  with open(descriptor, "rb") as stream:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
      raise OSError(errno.EINVAL, "it is no regular file", path)
    if status.st_size > largest:
      raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, more than the {largest:,} that are read", path)
    return stream.read(largest + 1)
