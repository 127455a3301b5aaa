"""The index of TFRecord shards: where each record lies. Built once, in parallel, and kept on disk or in a bucket."""

import concurrent.futures
import dataclasses
import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np

from nfnets.data.errors import reason
from nfnets.data.storage import remote, tfrecord
from nfnets.files import whole_file

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
    starts = [np.cumsum(one + (tfrecord.HEADER + tfrecord.FOOTER)) - (one + tfrecord.FOOTER) for one in lengths]
    return cls(
      files=tuple(files),
      file=np.repeat(np.arange(len(files), dtype=np.int32), [len(one) for one in lengths]),
      offset=np.concatenate([*starts, np.zeros(0, np.int64)]),
      length=np.concatenate([*lengths, np.zeros(0, np.int64)]),
    )

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


def default_cache_dir() -> str:
  return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nfnets")


def _stamps(files: list[str]) -> list[tuple[int, str]]:
  """(size in bytes, time of change or tag) of every file."""
  if any(map(remote.is_url, files)):
    return remote.stat_files(files)
  stats = [tfrecord.check_readable(file) for file in files]
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
  if remote.is_url(file):
    return tfrecord.scan(file, size, _forwards(remote.stream(file)))
  try:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
      if hasattr(os, "posix_fadvise"):  # the headers are far apart: reading ahead would read the whole file
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
      return tfrecord.scan(file, size, lambda at, length: os.pread(descriptor, length, at))
    finally:
      os.close(descriptor)
  except OSError as error:
    raise tfrecord._unreadable(file, error) from error


def _forwards(blocks: Iterator[bytes]) -> Callable[[int, int], bytes]:
  """`read(offset, length)` of a stream of blocks, for ascending offsets; what was passed is forgotten."""
  begin, block = 0, b""

  def read(at: int, length: int) -> bytes:
    nonlocal begin, block
    while at + length > begin + len(block):
      more = next(blocks, b"")
      if not more:
        break
      kept = block[max(0, at - begin) :]
      begin, block = begin + len(block) - len(kept), kept + more
    return block[at - begin : at - begin + length]

  return read


def _stem(file: str) -> str:
  return re.sub(r"\.tfrecord.*$", "", file.rsplit("/", 1)[-1]) or "records"


def _cache_path(files: list[str], cache_dir: str) -> str:
  key = hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]
  return f"{cache_dir.rstrip('/')}/{_stem(files[0]) if files else 'none'}-{key}.npz"


def _open(path: str) -> BinaryIO:
  if remote.is_url(path):
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
