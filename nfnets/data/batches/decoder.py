"""Decodes a source's images with a pool of threads and counts corrupt records."""

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

Process = tuple[int, int]  # index, count
CHUNK = 8  # rows that one task of a thread fills


class Timer:
  """Adds the CPU seconds that this thread spends in a `with` block to `times[name]`.

  There is no lock: of two additions at the same moment one may be lost.
  """

  def __init__(self, times: dict[str, float], name: str):
    self._times, self._name = times, name

  def __enter__(self) -> None:
    self._start = time.thread_time()

  def __exit__(self, *_) -> None:
    self._times[self._name] += time.thread_time() - self._start


class ImageDecoder:
  """Reads and decodes a source's images in a pool of threads; corrupt records are counted, and too many are an error.

  Args:
    source: the images.
    config: threads and max_corrupt are read here.
    size: side of the square images, pixels; None takes the side that they are stored with.
    say: called with a line about every corrupt record.
    resized: whether the images are resized to `size`; otherwise they must be stored with that size.
    field: the field of DataConfig that `size` comes from, for messages.
  """

  def __init__(
    self, source: Source, config: DataConfig, size: int | None, say: Callable[[str], None], *, resized: bool, field: str
  ):
    self.source, self._config, self._say = source, config, say
    self.corrupt: dict[int, str] = {}
    # CPU seconds of all threads by what they were spent on
    self.times = {"read": 0.0, "check": 0.0, "decode": 0.0, "mix": 0.0, "augment": 0.0}
    self._lock = threading.Lock()
    cv2.setNumThreads(1)  # the pool's threads use all cores already
    threads = config.threads or cores()
    self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
      self.size = self._output_size(size, field, resized=resized)
    except DataError:
      self.close()
      raise

  def close(self) -> None:
    """Ends the threads after the tasks that they have begun."""
    self._pool.shutdown(wait=True, cancel_futures=True)

  def _output_size(self, size: int | None, field: str, *, resized: bool) -> int:
    """Returns the side of the images that come out, pixels; raises DataError if the stored ones do not agree with it."""
    if resized:
      if size is None:
        raise DataError(f"config.data.{field} is unset, but images are to be resized; set it to their side in pixels")
      return size
    stored = self._stored_size()
    if size not in (None, stored):
      raise DataError(
        f"config.data.{field}={size}, but the images of {self.source.name} are {stored}×{stored} (leave it unset "
        "to take them as they are, or let train_crop and test_crop resize them)"
      )
    return stored

  def _stored_size(self) -> int:
    """Returns the side of the first image that can be decoded, pixels."""
    for index in range(len(self.source)):
      try:
        height, width = self.pixels(index)[0].shape[:2]
      except CorruptRecord:
        continue
      if height != width:
        raise DataError(
          f"the images of {self.source.name} are not square (record 0 is {height}×{width}); set "
          "config.data.train_crop=inception and test_crop=squash, say, which make them so"
        )
      return height
    raise DataError(f"no image of {self.source.name} can be decoded")

  def pixels(self, index: int) -> tuple[np.ndarray, int]:
    """Reads and decodes a record: (uint8 [H, W, 3], label). Raises CorruptRecord."""
    with self.timed("read"):
      raw = self.source.raw(index)
    with self.timed("check"):
      self.source.check(index, raw)
    with self.timed("read"):
      record = self.source.record(index, raw)
    with self.timed("decode"):
      return self.source.pixels(index, record), record.label

  def note_corrupt(self, index: int, error: CorruptRecord, consequence: str) -> None:
    """Counts a corrupt record and reports it, both only once; raises DataError when there are too many.

    Args:
      index: the record's number.
      error: what is wrong with it.
      consequence: what happens in its place, for the report.
    """
    with self._lock:
      if index in self.corrupt:
        return
      self.corrupt[index] = str(error)
      count = len(self.corrupt)
    if count > self._config.max_corrupt * len(self.source):
      raise DataError(
        f"{count} of the {len(self.source):,} records of {self.source.name} are corrupt, more than config.data."
        f"max_corrupt={self._config.max_corrupt:g} allows; the last: {error}"
      )
    self._say(f"corrupt record, {consequence}: {error}")

  def timed(self, name: str) -> Timer:
    """Measures a `with` block as part of `times[name]`."""
    return Timer(self.times, name)

  def as_stored(self, image: np.ndarray, index: int, field: str) -> np.ndarray:
    """Returns the image itself; raises DataError if it has not the size of the batch. field: what would resize it."""
    if image.shape[:2] != (self.size, self.size):
      raise DataError(
        f"{self.source.address(index)} is {image.shape[0]}×{image.shape[1]}, not {self.size}×{self.size}; set "
        f"config.data.{field} to what resizes images, or the image size to theirs"
      )
    return image

  def run(self, fill: Callable[[int, int], None], rows: int, finish: Callable[[], Batch]) -> Pending:
    """Lets the threads call `fill(start, stop)` for chunks of the rows; returns the batch of `finish()` to wait for."""
    return Pending([self._pool.submit(fill, start, min(start + CHUNK, rows)) for start in range(0, rows, CHUNK)], finish)


class DecodedBatches:
  """What batches for training and for evaluation have in common: the ImageDecoder that they own, and its public facts."""

  def __init__(self, decoder: ImageDecoder):
    self._decoder = decoder

  @property
  def source(self) -> Source:
    """The images."""
    return self._decoder.source

  @property
  def size(self) -> int:
    """Side of the square images, pixels."""
    return self._decoder.size

  @property
  def corrupt(self) -> dict[int, str]:
    """What is wrong with each corrupt record that was met so far, by its number."""
    return self._decoder.corrupt

  @property
  def times(self) -> dict[str, float]:
    """CPU seconds of all threads by phase: read, check, decode, mix, augment."""
    return self._decoder.times

  def close(self) -> None:
    """Ends the threads after the tasks that they have begun."""
    self._decoder.close()
