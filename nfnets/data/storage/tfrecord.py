"""TFRecord shards: framing and checking of records, and reading them from files on a disk.

A shard is a sequence of: length (uint64), masked CRC-32C of the length, payload, masked CRC-32C of the payload
(little-endian; https://www.tensorflow.org/tutorials/load_data/tfrecord). `nfnets.data.storage.example` parses payloads.
"""

import array
import errno
import os
import stat
import struct
import threading
from collections.abc import Callable, Sequence

import google_crc32c
import numpy as np

from nfnets.data.errors import DataError, reason
from nfnets.data.storage.regular import READ_ONLY

HEADER, FOOTER = 12, 4  # bytes before and after a payload


def scan(name: str, size: int, read: Callable[[int, int], bytes]) -> np.ndarray:
  """Returns the lengths of a shard's payloads, int64 [n], from the records' headers.

  Args:
    name: the shard, for messages.
    size: its bytes.
    read: `read(offset, length)` returns bytes of the shard; called with ascending offsets.

  Raises:
    DataError: the shard is empty, damaged or truncated; names the byte.
  """
  if not size:
    raise DataError(f"{name} is empty (0 bytes); prepare the dataset again, or copy this shard again")
  lengths, at = array.array("q"), 0
  while at < size:
    header = read(at, HEADER)
    if len(header) < HEADER:
      raise _truncated(name, size, at, len(lengths))
    length, crc = struct.unpack("<QI", header)
    if masked_crc(header[:8]) != crc:
      problem = "is damaged" if at else "is no TFRecord file, or damaged,"
      raise DataError(f"{name} {problem} at byte {at}: the checksum of the length of record {len(lengths) + 1} is wrong")
    if at + HEADER + length + FOOTER > size:
      raise _truncated(name, size, at, len(lengths))
    lengths.append(length)
    at += HEADER + length + FOOTER
  return np.frombuffer(lengths, np.int64).copy()


def _truncated(name: str, size: int, at: int, records: int) -> DataError:
  """Returns the error for a shard that ends within the record at byte `at`; records: how many precede it."""
  return DataError(f"{name} is truncated: record {records + 1} at byte {at} goes beyond the file's end at byte {size}")


class FileReader:
  """Reads parts of files on a disk, from any number of threads. Files are opened when first needed."""

  def __init__(self, files: Sequence[str]):
    import resource  # does not exist on Windows

    self.files = tuple(files)
    self._open: dict[int, int] = {}
    self._lock = threading.Lock()
    self._closed = False
    # A process may open a limited number of files, which two sources, sockets and checkpoints share. Files beyond this
    # number are opened anew for each read.
    self._max_open = max(1, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 4096) // 4)

  def read(self, file: int, offset: int, length: int) -> bytes:
    """Returns bytes [offset, offset + length) of files[file]. Raises OSError, also when the file ends before."""
    descriptor = self._open.get(file)
    if descriptor is None:
      descriptor = self._open_if_allowed(file)
    if descriptor is not None:
      return _pread(descriptor, offset, length)
    descriptor = os.open(self.files[file], READ_ONLY)
    try:
      return _pread(descriptor, offset, length)
    finally:
      os.close(descriptor)

  def prefetch(self, requests: Sequence[tuple[int, int, int]]) -> None:
    """Does nothing: reading ahead does not pay on a disk. requests: (file, offset, length) in the order of need."""

  def close(self) -> None:
    """Closes the files; no thread may be reading."""
    with self._lock:
      self._closed = True
      while self._open:
        os.close(self._open.popitem()[1])

  def _open_if_allowed(self, file: int) -> int | None:
    """Returns the descriptor of a file that stays open; None where too many files are open already."""
    with self._lock:
      if self._closed:
        raise OSError(f"{self.files[file]} is read after its reader was closed")
      if file not in self._open and len(self._open) < self._max_open:
        self._open[file] = os.open(self.files[file], READ_ONLY)
      return self._open.get(file)


def _pread(descriptor: int, offset: int, length: int) -> bytes:
  data = os.pread(descriptor, length, offset)
  while len(data) < length:
    rest = os.pread(descriptor, length - len(data), offset + len(data))
    if not rest:
      raise OSError(f"the file ends at byte {offset + len(data)}, {length - len(data)} bytes too early")
    data += rest
  return data


def masked_crc(data: bytes) -> int:
  """Returns the CRC-32C as TFRecord stores it: rotated right by 15 bits plus a constant, so that a CRC of CRCs stays useful."""
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def check_crc(record: bytes) -> None:
  """Checks a whole record (header, payload, footer). Raises ValueError when a checksum or the length is wrong."""
  if len(record) < HEADER + FOOTER:
    raise ValueError(f"{len(record)} bytes are no record")
  length, crc = struct.unpack("<QI", record[:HEADER])
  if masked_crc(record[:8]) != crc:
    raise ValueError("the checksum of its length is wrong")
  if length != len(record) - HEADER - FOOTER:
    raise ValueError(f"its length is {length} bytes, {len(record) - HEADER - FOOTER} were expected")
  if masked_crc(record[HEADER:-FOOTER]) != struct.unpack("<I", record[-FOOTER:])[0]:
    raise ValueError("the checksum of its bytes is wrong")


def check_readable(file: str) -> os.stat_result:
  """Returns the stat of a local file; raises DataError when it is missing, no regular file, or may not be read."""
  try:
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
      raise OSError(errno.EINVAL, "it is no regular file")
    if not os.access(file, os.R_OK):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
  except OSError as error:
    raise unreadable(file, error) from error
  return status


def unreadable(file: str, error: OSError) -> DataError:
  """Returns the error that tells why a shard cannot be read."""
  return DataError(f"shard {file} cannot be read: {reason(error)}")


# ---- writing


def frame(payload: bytes) -> bytes:
  """Returns the record of a TFRecord file that holds `payload`."""
  length = struct.pack("<Q", len(payload))
  return b"".join((length, struct.pack("<I", masked_crc(length)), payload, struct.pack("<I", masked_crc(payload))))
