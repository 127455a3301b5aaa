"""A source's images as squares, decoded by a pool of threads, with corrupt records counted."""

import collections
import concurrent.futures
import threading
import time
from collections.abc import Callable

import cv2
import numpy as np

from nfnets.config import DataConfig
from nfnets.data.batches.prefetch import Batch, Pending, cores
from nfnets.data.errors import CorruptRecord, DataError
from nfnets.data.sources.base import Source


class Timer:
  """Adds this thread's CPU seconds to an entry; two threads may rarely lose an addition to each other, never a key."""

  def __init__(self, times: dict[str, float], name: str):
    self._times, self._name = times, name

  def __enter__(self) -> None:
    self._start = time.thread_time()

  def __exit__(self, *_) -> None:
    self._times[self._name] += time.thread_time() - self._start


Process = tuple[int, int]  # index, count


CHUNK = 8  # rows that one task of a thread fills


class ImageDecoder:
  """A source's images as squares, decoded by a pool of threads; corrupt records are counted, and too many of them end it."""

  def __init__(
    self, source: Source, config: DataConfig, size: int | None, say: Callable[[str], None], *, resized: bool, field: str
  ):
    self.source, self._config, self._say = source, config, say
    self.corrupt: dict[int, str] = {}
    self.unreported: collections.deque[int] = collections.deque()
    # CPU seconds of all threads by what they were spent on
    self.times = {"read": 0.0, "check": 0.0, "decode": 0.0, "mix": 0.0, "augment": 0.0}
    self._lock = threading.Lock()
    cv2.setNumThreads(1)  # the threads are ours
    threads = config.threads or cores()
    self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="decode")
    stored = None if resized else self._stored_size()
    if stored and size not in (None, stored):
      self.close()
      raise DataError(
        f"config.data.{field}={size}, but the images of {source.name} are {stored}×{stored} (leave it unset "
        "to take them as they are, or let train_crop and test_crop resize them)"
      )
    self.size = size or stored

  def close(self) -> None:
    """Ends the threads, waiting for what they are doing."""
    self._pool.shutdown(wait=True, cancel_futures=True)

  def _stored_size(self) -> int:
    for index in range(len(self.source)):
      try:
        height, width = self.pixels(index)[0].shape[:2]
      except CorruptRecord:
        continue
      if height != width:
        self.close()
        raise DataError(
          f"the images of {self.source.name} are not square (record 0 is {height}×{width}); set "
          "config.data.train_crop=inception and test_crop=squash, say, which make them so"
        )
      return height
    raise DataError(f"no image of {self.source.name} can be decoded")

  def pixels(self, index: int) -> tuple[np.ndarray, int]:
    """(uint8 [H, W, 3], label). Raises CorruptRecord."""
    with self.timed("read"):
      raw = self.source.raw(index)
    with self.timed("check"):
      self.source.check(index, raw)
    with self.timed("read"):
      record = self.source.record(index, raw)
    with self.timed("decode"):
      return self.source.pixels(index, record), record.label

  def note_corrupt(self, index: int, error: CorruptRecord, then: str) -> None:
    with self._lock:
      if index in self.corrupt:
        return
      self.corrupt[index] = str(error)
      self.unreported.append(index)
      found = len(self.corrupt)
    if found > self._config.max_corrupt * len(self.source):
      raise DataError(
        f"{found} of the {len(self.source):,} records of {self.source.name} are corrupt, more than config.data."
        f"max_corrupt={self._config.max_corrupt:g} allows; the last: {error}"
      )
    self._say(f"corrupt record, {then}: {error}")

  def timed(self, name: str) -> Timer:
    return Timer(self.times, name)

  def as_stored(self, image: np.ndarray, index: int, field: str) -> np.ndarray:
    if image.shape[:2] != (self.size, self.size):
      raise DataError(
        f"{self.source.address(index)} is {image.shape[0]}×{image.shape[1]}, not {self.size}×{self.size}; set "
        f"config.data.{field} to what resizes images, or the image size to theirs"
      )
    return image

  def run(self, work: Callable[[int, int], None], rows: int, finish: Callable[[], Batch]) -> "Pending":
    return Pending([self._pool.submit(work, at, min(at + CHUNK, rows)) for at in range(0, rows, CHUNK)], finish)


class DecodedBatches:
  """The public face of both kinds of batches over the ImageDecoder that they own."""

  def __init__(self, decoder: ImageDecoder):
    self._decoder = decoder

  @property
  def source(self) -> Source:
    return self._decoder.source

  @property
  def size(self) -> int:
    """Side of the square images, pixels."""
    return self._decoder.size

  @property
  def corrupt(self) -> dict[int, str]:
    """What is wrong with each record found corrupt here, by its number."""
    return self._decoder.corrupt

  @property
  def times(self) -> dict[str, float]:
    """CPU seconds of all threads by phase: read, check, decode, mix, augment."""
    return self._decoder.times

  def close(self) -> None:
    """Ends the threads, waiting for what they are doing."""
    self._decoder.close()
