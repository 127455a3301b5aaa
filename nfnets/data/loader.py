"""Batches as a pure function of (seed, step), so that a resumed run sees what an uninterrupted one would have seen."""
import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np

from nfnets.config import DataConfig
from nfnets.data.sources import Images

Batch = dict[str, np.ndarray]


class TrainBatches:
  """`batches[step]` → {"image": uint8 [batch, H, W, 3], "label": int32 [batch]}; any step, in any order.

  The images of all epochs follow each other without a gap: a batch may span two epochs, and none is dropped. An image's
  augmentation depends on (seed, epoch, index) alone.
  """

  def __init__(self, data: Images, config: DataConfig, *, batch: int, seed: int):
    self._data, self._config, self._batch, self._seed = data, config, batch, seed
    self._epochs: dict[int, dict[str, np.ndarray]] = {}

  def __getitem__(self, step: int) -> Batch:
    position = np.arange(step * self._batch, (step + 1) * self._batch)
    epoch, offset = np.divmod(position, len(self._data))
    parts = [self._part(e, offset[epoch == e]) for e in np.unique(epoch)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

  def _part(self, epoch: int, offset: np.ndarray) -> Batch:
    draws = self._draws(int(epoch))
    index = draws["order"][offset]
    images = self._data.images[index]
    if self._config.shift:
      images = shift_images(images, draws["shift"][index])
    if self._config.flip:
      images = np.where(draws["flip"][index][:, None, None, None], images[:, :, ::-1], images)
    return {"image": images, "label": self._data.labels[index]}

  def _draws(self, epoch: int) -> dict[str, np.ndarray]:
    drawn = self._epochs.get(epoch)
    if drawn is None:
      rng = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
      n, shift = len(self._data), self._config.shift
      drawn = {"order": rng.permutation(n), "shift": rng.integers(-shift, shift + 1, (n, 2)), "flip": rng.random(n) < 0.5}
      self._epochs = {e: d for e, d in self._epochs.items() if e == epoch - 1} | {epoch: drawn}
    return drawn


def shift_images(images: np.ndarray, by: np.ndarray) -> np.ndarray:
  """Moves images [n, H, W, 3] by (dy, dx) pixels, `by` int [n, 2]; what comes in from outside repeats the edge."""
  n, height, width = images.shape[:3]
  rows = np.clip(np.arange(height) - by[:, :1], 0, height - 1)
  columns = np.clip(np.arange(width) - by[:, 1:], 0, width - 1)
  return images[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def eval_batches(data: Images, batch: int) -> Iterator[Batch]:
  """All images once, in order; the last batch is padded with zeros, "mask" bool [batch] says which images count."""
  for start in range(0, len(data), batch):
    images, labels = data.images[start:start + batch], data.labels[start:start + batch]
    missing = batch - len(labels)
    pad = lambda x, missing=missing: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    yield {"image": pad(images), "label": pad(labels), "mask": np.arange(batch) < len(labels)}


def prefetch(make: Callable[[int], object], start: int, stop: int, *, depth: int = 2) -> Iterator[object]:
  """Yields make(start) … make(stop - 1), computed up to `depth` ahead in a thread that ends with the iteration.

  An exception in `make` is raised here, at the step that it belongs to.
  """
  ready: queue.Queue = queue.Queue(maxsize=depth)
  closed = threading.Event()

  def put(item: tuple[object, BaseException | None]) -> bool:
    while not closed.is_set():
      try:
        ready.put(item, timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  def work() -> None:
    for step in range(start, stop):
      try:
        item = (make(step), None)
      except BaseException as error:  # handed over, whatever it is: the consumer must not wait for ever
        put((None, error))
        return
      if not put(item):
        return

  thread = threading.Thread(target=work, name="prefetch", daemon=True)
  thread.start()
  try:
    for _ in range(start, stop):
      value, error = ready.get()
      if error is not None:
        raise error
      yield value
  finally:
    closed.set()
    thread.join()
