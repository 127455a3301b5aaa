"""The index of TFRecord shards: the position of each record. Built once, in parallel, and kept on disk or in a bucket."""

import concurrent.futures
import dataclasses
import hashlib
import io
import os
import re
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np

from nfnets.data.errors import reason
from nfnets.data.storage import remote, tfrecord
from nfnets.data.storage.regular import READ_ONLY, read_regular
from nfnets.files import whole_file

_LARGEST = 1 << 32  # bytes of a kept index, which has eight for each record
_PROGRESS_SECONDS = 10.0  # between two progress lines
_Stamp = tuple[int, str]  # size in bytes, and the time of change or tag of a file


@dataclasses.dataclass(frozen=True, slots=True)
class RecordIndex:
  """The positions of n records.

  Attributes:
    files: paths or URLs of the shards.
    file: int32 [n], ascending; the place in `files` of each record's shard.
    offset: int64 [n]; the byte at which each payload begins.
    length: int64 [n]; bytes of each payload.
  """

  files: tuple[str, ...]
  file: np.ndarray
  offset: np.ndarray
  length: np.ndarray

  @classmethod
  def of(cls, files: Sequence[str], lengths: Sequence[np.ndarray]) -> "RecordIndex":
    """Makes the index from the lengths of each file's payloads, int64 [records]: records follow each other without gaps."""
    frame = tfrecord.HEADER + tfrecord.FOOTER
    starts = [np.cumsum(in_file + frame) - (in_file + tfrecord.FOOTER) for in_file in lengths]
    return cls(
      files=tuple(files),
      file=np.repeat(np.arange(len(files), dtype=np.int32), [len(in_file) for in_file in lengths]),
      offset=np.concatenate([*starts, np.zeros(0, np.int64)]),
      length=np.concatenate([*lengths, np.zeros(0, np.int64)]),
    )

  def __len__(self) -> int:
    return len(self.file)

  def counts(self) -> np.ndarray:
    """Returns how many records each file holds, int64 [files]."""
    return np.bincount(self.file, minlength=len(self.files))


def load_index(files: Sequence[str], *, cache_dir: str, progress: Callable[[str], None]) -> RecordIndex:
  """Returns the index of shards; it is built once, in parallel, and kept under `cache_dir`.

  An index whose shards have other sizes or times of change is built again.

  Args:
    files: absolute paths or URLs of the shards.
    cache_dir: a directory or the URL of one in a bucket; where it cannot be written, nothing is kept, with a progress line.
    progress: called with one line about each step that takes long.

  Raises:
    DataError: a shard is missing, unreadable, empty or truncated, or is no TFRecord file.
  """
  files = [os.fspath(file) for file in files]
  stamps = _stamps(files)
  path = _cache_path(files, cache_dir)
  cached, reason_to_build = _read_cache(path, files, stamps)
  if cached is not None:
    return cached
  subject = f"{len(files)} shard{'s' * (len(files) > 1)} of {_stem(files[0])}" if files else "nothing"
  progress(f"indexing {subject} ({reason_to_build})")
  index = RecordIndex.of(files, _scan_all(files, [size for size, _ in stamps], progress))
  try:
    _write_cache(path, index, stamps)
  except Exception as error:  # the libraries of buckets raise errors of their own; the run needs no cache
    progress(f"cannot keep the index in {cache_dir} ({reason(error)}): it will be built again next time (config.data.index_dir)")
  return index


def default_cache_dir() -> str:
  """Returns the directory in which indices are kept unless config.data.index_dir is set."""
  return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nfnets")


def _stamps(files: list[str]) -> list[_Stamp]:
  """Returns what shows that a file has changed: its size and its time of change or tag."""
  if any(map(remote.is_url, files)):
    return remote.stat_files(files)
  stats = [tfrecord.check_readable(file) for file in files]
  return [(stat.st_size, str(stat.st_mtime_ns)) for stat in stats]


def _scan_all(files: list[str], sizes: list[int], progress: Callable[[str], None]) -> list[np.ndarray]:
  """Returns the lengths of each file's payloads, int64 [records]; `sizes` are the files' bytes."""
  if not files:
    return []
  last_line = time.monotonic()
  pool = concurrent.futures.ThreadPoolExecutor(min(32, len(files)))
  try:
    jobs = [pool.submit(_scan_file, file, size) for file, size in zip(files, sizes, strict=True)]
    for done, job in enumerate(concurrent.futures.as_completed(jobs), 1):
      job.result()
      if time.monotonic() - last_line > _PROGRESS_SECONDS:
        last_line = time.monotonic()
        progress(f"indexed {done} of {len(files)} shards")
    return [job.result() for job in jobs]
  finally:
    pool.shutdown(cancel_futures=True)


def _scan_file(file: str, size: int) -> np.ndarray:
  if remote.is_url(file):
    return tfrecord.scan(file, size, _read_ascending(remote.stream(file)))
  try:
    descriptor = os.open(file, READ_ONLY)
    try:
      if hasattr(os, "posix_fadvise"):  # the headers are far apart: reading ahead would read the whole file
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
      return tfrecord.scan(file, size, lambda at, length: os.pread(descriptor, length, at))
    finally:
      os.close(descriptor)
  except OSError as error:
    raise tfrecord.unreadable(file, error) from error


def _read_ascending(blocks: Iterator[bytes]) -> Callable[[int, int], bytes]:
  """Returns `read(offset, length)` over a stream of blocks, to be called with ascending offsets; passed bytes are dropped."""
  begin, buffer = 0, b""  # the bytes of the stream from `begin` on

  def read(offset: int, length: int) -> bytes:
    nonlocal begin, buffer
    while offset + length > begin + len(buffer):
      block = next(blocks, b"")
      if not block:
        break
      rest = buffer[max(0, offset - begin) :]
      begin, buffer = begin + len(buffer) - len(rest), rest + block
    return buffer[offset - begin : offset - begin + length]

  return read


def _stem(file: str) -> str:
  """Returns the name of a shard without its suffix and number: the dataset and the split."""
  return re.sub(r"\.tfrecord.*$", "", file.rsplit("/", 1)[-1]) or "records"


def _cache_path(files: list[str], cache_dir: str) -> str:
  key = hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]
  return f"{cache_dir.rstrip('/')}/{_stem(files[0]) if files else 'none'}-{key}.npz"


def _open(path: str) -> BinaryIO:
  if remote.is_url(path):
    return io.BytesIO(remote.read_file(path))
  return io.BytesIO(read_regular(path, _LARGEST))


def _read_cache(path: str, files: list[str], stamps: list[_Stamp]) -> tuple[RecordIndex | None, str]:
  """Returns (the kept index, "") or (None, why it must be built)."""
  try:
    with _open(path) as stream, np.load(stream, allow_pickle=False) as arrays:
      if any(entry.compress_type != zipfile.ZIP_STORED for entry in arrays.zip.infolist()):
        raise ValueError("its arrays are compressed")  # ours are not; those of others could be far larger than the file
      kept_stamps = [*zip(arrays["sizes"].tolist(), arrays["stamps"].tolist(), strict=True)]
      if arrays["files"].tolist() != files or kept_stamps != stamps:
        return None, "a shard has changed since the index was made"
      return RecordIndex.of(files, _checked_lengths(arrays["lengths"], arrays["counts"], stamps)), ""
  except Exception as error:  # of any kind: building the index anew mends a damaged one
    if isinstance(error, FileNotFoundError) or isinstance(error.__cause__, FileNotFoundError):
      return None, "once"
    return None, f"the index in {path} cannot be read: {reason(error)}"


def _checked_lengths(lengths: np.ndarray, counts: np.ndarray, stamps: list[_Stamp]) -> list[np.ndarray]:
  """Returns the lengths of each file's payloads, int64 [records]; raises ValueError unless they fill the files exactly."""
  if any(array.dtype != np.int64 or array.ndim != 1 for array in (lengths, counts)):
    raise ValueError("its arrays are of the wrong kind")
  if len(counts) != len(stamps) or counts.min(initial=0) < 0 or lengths.min(initial=0) < 0:
    raise ValueError("its numbers are out of range")
  by_file = np.split(lengths, np.cumsum(counts)[:-1]) if len(counts) else []
  frame = tfrecord.HEADER + tfrecord.FOOTER
  for in_file, count, (size, _) in zip(by_file, counts.tolist(), stamps, strict=True):
    if len(in_file) != count or in_file.max(initial=0) > size or int(in_file.sum()) + frame * count != size:
      raise ValueError("its records do not fill the shards")
  return by_file


def _write_cache(path: str, index: RecordIndex, stamps: list[_Stamp]) -> None:
  arrays = {
    "files": np.asarray(index.files),
    "sizes": np.asarray([size for size, _ in stamps], np.int64),
    "stamps": np.asarray([stamp for _, stamp in stamps]),
    "counts": index.counts(),
    "lengths": index.length,
  }
  if remote.is_url(path):  # an object appears in a bucket whole, or not at all
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    remote.write_file(path, stream.getvalue())
    return
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with whole_file(path) as stream:
    np.savez(stream, **arrays)
