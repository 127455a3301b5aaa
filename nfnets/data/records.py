"""TFRecord shards as random access: where each record lies (an index, kept on disk), and reading one.

A shard is a sequence of: length (uint64), masked CRC-32C of the length, payload, masked CRC-32C of the payload
(little-endian; https://www.tensorflow.org/tutorials/load_data/tfrecord). What a record
holds: `nfnets.data.example`.
"""
import array
import concurrent.futures
import dataclasses
import errno
import hashlib
import io
import os
import re
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import google_crc32c
import numpy as np

from nfnets.data.errors import DataError, reason

HEADER, FOOTER = 12, 4  # bytes before and after a payload
_SAY_EVERY = 10.0  # seconds between two progress lines


@dataclasses.dataclass(frozen=True, slots=True)
class RecordIndex:
  """Where n records lie. file: int32 [n], a position in files, ascending; offset, length: int64 [n], bytes, of the payload."""

  files: tuple[str, ...]
  file: np.ndarray
  offset: np.ndarray
  length: np.ndarray

  @classmethod
  def of(cls, files: Sequence[str], lengths: Sequence[np.ndarray]) -> "RecordIndex":
    """The index of files from the lengths of each one's payloads, in order: records follow each other without gaps."""
    starts = [np.cumsum(one + (HEADER + FOOTER)) - (one + FOOTER) for one in lengths]
    return cls(files=tuple(files), file=np.repeat(np.arange(len(files), dtype=np.int32), [len(one) for one in lengths]),
               offset=np.concatenate([*starts, np.zeros(0, np.int64)]), length=np.concatenate([*lengths, np.zeros(0, np.int64)]))

  def __len__(self) -> int:
    return len(self.file)

  def counts(self) -> np.ndarray:
    """int64 [files]: how many records each file holds."""
    return np.bincount(self.file, minlength=len(self.files))


def load_index(files: Sequence[str], *, cache_dir: str, progress: Callable[[str], None]) -> RecordIndex:
  """The index of shards (absolute paths, or URLs); built once, in parallel, and kept under cache_dir (a bucket too).

  An index whose shards have other sizes or times of change is built again. Where cache_dir cannot be written, nothing is
  kept and `progress` is told so.

  Raises DataError when a shard is missing, unreadable, empty or truncated, or is no TFRecord file.
  """
  files = [os.fspath(file) for file in files]
  stamps = _stamps(files)
  path = _cache_path(files, cache_dir)
  kept, why = _read_cache(path, files, stamps)
  if kept is not None:
    return kept
  where = f"{len(files)} shard{'s' * (len(files) > 1)} of {_stem(files[0])}" if files else "nothing"
  progress(f"indexing {where} ({why})")
  index = RecordIndex.of(files, _scan_all(files, [size for size, _ in stamps], progress))
  try:
    _write_cache(path, index, stamps)
  except Exception as error:  # the bucket libraries raise errors of their own; the run needs no cache
    progress(f"cannot keep the index in {cache_dir} ({reason(error)}): it will be built again next time (config.data.index_dir)")
  return index


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


# The index, built and kept -----------------------------------------------------------------------------------------------


def is_url(path: str) -> bool:
  return "://" in path


def default_cache_dir() -> str:
  return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nfnets")


def check_readable(file: str) -> os.stat_result:
  """Raises DataError when a local file is missing or may not be read."""
  try:
    stat = os.stat(file)
    if not os.access(file, os.R_OK):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
  except OSError as error:
    raise _unreadable(file, error) from error
  return stat


def _stamps(files: list[str]) -> list[tuple[int, str]]:
  """(size in bytes, time of change or tag) of every file."""
  if any(map(is_url, files)):
    from nfnets.data import remote
    return remote.stat_files(files)
  stats = [check_readable(file) for file in files]
  return [(stat.st_size, str(stat.st_mtime_ns)) for stat in stats]


def _scan_all(files: list[str], sizes: list[int], progress: Callable[[str], None]) -> list[np.ndarray]:
  if not files:
    return []
  said = time.monotonic()
  pool = concurrent.futures.ThreadPoolExecutor(min(32, len(files)))
  try:
    jobs = [pool.submit(_scan_file, file, size) for file, size in zip(files, sizes, strict=True)]
    for done, job in enumerate(concurrent.futures.as_completed(jobs), 1):
      job.result()
      if time.monotonic() - said > _SAY_EVERY:
        said = time.monotonic()
        progress(f"indexed {done} of {len(files)} shards")
    return [job.result() for job in jobs]
  finally:
    pool.shutdown(cancel_futures=True)


def _scan_file(file: str, size: int) -> np.ndarray:
  if is_url(file):
    from nfnets.data import remote
    return scan(file, size, _forwards(remote.stream(file)))
  try:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
      if hasattr(os, "posix_fadvise"):  # the headers are far apart: reading ahead would read the whole file
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
      return scan(file, size, lambda at, length: os.pread(descriptor, length, at))
    finally:
      os.close(descriptor)
  except OSError as error:
    raise _unreadable(file, error) from error


def _forwards(blocks: Iterator[bytes]) -> Callable[[int, int], bytes]:
  """`read(offset, length)` of a stream of blocks, for ascending offsets; what was passed is forgotten."""
  begin, block = 0, b""

  def read(at: int, length: int) -> bytes:
    nonlocal begin, block
    while at + length > begin + len(block):
      more = next(blocks, b"")
      if not more:
        break
      kept = block[max(0, at - begin):]
      begin, block = begin + len(block) - len(kept), kept + more
    return block[at - begin:at - begin + length]
  return read


def _unreadable(file: str, error: OSError) -> DataError:
  return DataError(f"shard {file} cannot be read: {reason(error)}")


def _stem(file: str) -> str:
  return re.sub(r"\.tfrecord.*$", "", file.rsplit("/", 1)[-1]) or "records"


def _cache_path(files: list[str], cache_dir: str) -> str:
  key = hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]
  return f"{cache_dir.rstrip('/')}/{_stem(files[0]) if files else 'none'}-{key}.npz"


def _open(path: str) -> BinaryIO:
  if is_url(path):
    from nfnets.data import remote
    return io.BytesIO(remote.read_file(path))
  return open(path, "rb")


def _read_cache(path: str, files: list[str], stamps: list[tuple[int, str]]) -> tuple[RecordIndex | None, str]:
  try:
    with _open(path) as stream, np.load(stream, allow_pickle=False) as kept:
      if kept["files"].tolist() != files or [*zip(kept["sizes"].tolist(), kept["stamps"].tolist(), strict=True)] != stamps:
        return None, "a shard has changed since the index was made"
      return RecordIndex.of(files, np.split(kept["lengths"], np.cumsum(kept["counts"])[:-1])), ""
  except Exception as error:  # whatever is wrong with a cache, building it anew mends it
    if isinstance(error, FileNotFoundError) or isinstance(error.__cause__, FileNotFoundError):
      return None, "once"
    return None, f"the index in {path} cannot be read: {reason(error)}"


def _write_cache(path: str, index: RecordIndex, stamps: list[tuple[int, str]]) -> None:
  arrays = {"files": np.asarray(index.files), "sizes": np.asarray([size for size, _ in stamps], np.int64),
            "stamps": np.asarray([stamp for _, stamp in stamps]), "counts": index.counts(), "lengths": index.length}
  if is_url(path):  # an object appears in a bucket whole, or not at all
    from nfnets.data import remote
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    remote.write_file(path, stream.getvalue())
    return
  os.makedirs(os.path.dirname(path), exist_ok=True)
  temporary = f"{path}.{uuid.uuid4().hex}.tmp"
  try:
    with open(temporary, "xb") as stream:
      np.savez(stream, **arrays)
    os.replace(temporary, path)
  finally:
    if os.path.exists(temporary):
      os.unlink(temporary)
