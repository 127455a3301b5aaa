"""TFRecord shards: how records are framed and checked, and reading one from a file on a disk.

A shard is a sequence of: length (uint64), masked CRC-32C of the length, payload, masked CRC-32C of the payload
(little-endian; https://www.tensorflow.org/tutorials/load_data/tfrecord). What a record
holds: `nfnets.data.storage.example`.
"""

import array
import errno
import os
import struct
import threading
from collections.abc import Callable, Sequence

import google_crc32c
import numpy as np

from nfnets.data.errors import DataError, reason

HEADER, FOOTER = 12, 4  # bytes before and after a payload


def scan(name: str, size: int, read: Callable[[int, int], bytes]) -> np.ndarray:
  """int64 [n]: the lengths of a shard's payloads. `read(offset, length)` is called in ascending order, for headers only.

  Raises DataError naming the byte at which the shard stops being one.
  """
  if not size:
    raise DataError(f"{name} is empty (0 bytes); prepare the dataset again, or copy this shard again")
  lengths, at = array.array("q"), 0
  while at < size:
    header = read(at, HEADER)
    if len(header) == HEADER:
      length, crc = struct.unpack("<QI", header)
      if masked_crc(header[:8]) != crc:
        kind = "is damaged" if at else "is no TFRecord file, or damaged,"
        raise DataError(f"{name} {kind} at byte {at}: the checksum of the length of record {len(lengths) + 1} is wrong")
    if len(header) < HEADER or at + HEADER + length + FOOTER > size:
      raise DataError(f"{name} is truncated: record {len(lengths) + 1} at byte {at} goes beyond the file's end at byte {size}")
    lengths.append(length)
    at += HEADER + length + FOOTER
  return np.frombuffer(lengths, np.int64).copy()


class FileReader:
  """Reads parts of files on a disk; any number of threads may. Files are opened when first needed."""

  def __init__(self, files: Sequence[str]):
    import resource  # not on Windows

    self.files = tuple(files)
    self._open: dict[int, int] = {}
    self._lock = threading.Lock()
    self._closed = False
    # Two sources, sockets and checkpoints share what the system grants; files beyond this number are opened for each read.
    self._most_open = max(1, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 4096) // 4)

  def read(self, file: int, offset: int, length: int) -> bytes:
    """Bytes [offset, offset + length) of files[file]. Raises OSError, also when the file ends before."""
    descriptor = self._open.get(file)
    if descriptor is None:
      descriptor = self._descriptor(file)
    if descriptor is not None:
      return _pread(descriptor, offset, length)
    descriptor = os.open(self.files[file], os.O_RDONLY | os.O_CLOEXEC)
    try:
      return _pread(descriptor, offset, length)
    finally:
      os.close(descriptor)

  def prefetch(self, requests: Sequence[tuple[int, int, int]]) -> None:
    """(file, offset, length) of what is needed next: a disk needs no hint."""

  def close(self) -> None:
    """Closes the files; no thread may be reading."""
    with self._lock:
      self._closed = True
      while self._open:
        os.close(self._open.popitem()[1])

  def _descriptor(self, file: int) -> int | None:
    with self._lock:
      if self._closed:
        raise OSError(f"{self.files[file]} is read after its reader was closed")
      if file not in self._open and len(self._open) < self._most_open:
        self._open[file] = os.open(self.files[file], os.O_RDONLY | os.O_CLOEXEC)
      return self._open.get(file)


def _pread(descriptor: int, offset: int, length: int) -> bytes:
  data = os.pread(descriptor, length, offset)
  while len(data) < length:
    more = os.pread(descriptor, length - len(data), offset + len(data))
    if not more:
      raise OSError(f"the file ends at byte {offset + len(data)}, {length - len(data)} bytes too early")
    data += more
  return data


def masked_crc(data: bytes) -> int:
  """CRC-32C as TFRecord stores it: rotated right by 15 bits plus a constant, so that a CRC of CRCs stays useful."""
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def check_crc(record: bytes) -> None:
  """Checks one whole record (header, payload, footer). Raises ValueError when a checksum or the length is wrong."""
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
  """Raises DataError when a local file is missing or may not be read."""
  try:
    stat = os.stat(file)
    if not os.access(file, os.R_OK):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
  except OSError as error:
    raise _unreadable(file, error) from error
  return stat


def _unreadable(file: str, error: OSError) -> DataError:
  return DataError(f"shard {file} cannot be read: {reason(error)}")


# ---- writing


def frame(payload: bytes) -> bytes:
  """A record of a TFRecord file."""
  length = struct.pack("<Q", len(payload))
  return b"".join((length, struct.pack("<I", masked_crc(length)), payload, struct.pack("<I", masked_crc(payload))))
