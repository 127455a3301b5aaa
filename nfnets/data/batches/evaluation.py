"""Evaluation batches: every image of a split once, in order, the last batch padded and masked."""

from collections.abc import Callable, Generator

import numpy as np

from nfnets.config import DataConfig
from nfnets.data.batches.decoder import DecodedBatches, ImageDecoder, Process
from nfnets.data.batches.prefetch import Batch, Pending, prefetch
from nfnets.data.errors import CorruptRecord
from nfnets.data.images import decode
from nfnets.data.sources.base import Source


class EvalBatches(DecodedBatches):
  """Iterates once over all images, in order: {"image": uint8 [rows, S, S, 3], "label": int32 [rows], "mask": bool [rows]}.

  The mask says which rows count. The last batch is padded with zeros, which it leaves out; so it does a corrupt record,
  which is reported.

  Args:
    source: the images.
    config: how they are cropped, and how many may be corrupt.
    batch: rows of the global batch; rounded up to a multiple of the number of processes.
    process: (index, count); each process makes its own rows of the global batch.
    say: called with a line about every corrupt record.
  """

  def __init__(
    self, source: Source, config: DataConfig, *, batch: int, process: Process = (0, 1), say: Callable[[str], None] = print
  ):
    super().__init__(
      ImageDecoder(source, config, config.test_image_size, say, resized=config.test_crop != "none", field="test_image_size")
    )
    self.config, self._process = config, process
    self._rows = -(-batch // process[1])
    self.batch = self._rows * process[1]

  def __len__(self) -> int:
    return -(-len(self.source) // self.batch)

  def __iter__(self) -> Generator[Batch, None, None]:
    yield from prefetch(self.start, 0, len(self))

  def start(self, step: int) -> Pending:
    """Lets the threads begin with a batch; `result()` waits for it."""
    first = step * self.batch + self._process[0] * self._rows
    stop = min(first + self._rows, len(self.source))
    batch = {
      "image": np.zeros((self._rows, self.size, self.size, 3), np.uint8),
      "label": np.zeros(self._rows, np.int32),
      "mask": np.arange(first, first + self._rows) < stop,
    }
    if self.source.remote and first < stop:
      self.source.prefetch(np.arange(first, stop))

    def fill(begin: int, end: int) -> None:
      for row in range(begin, end):
        try:
          image, batch["label"][row] = self._decoder.pixels(first + row)
        except CorruptRecord as error:
          self._decoder.note_corrupt(first + row, error, "left out of the evaluation")
          batch["mask"][row] = False
          continue
        with self._decoder.timed("decode"):
          if self.config.test_crop == "none":
            batch["image"][row] = self._decoder.as_stored(image, first + row, "test_crop")
          else:
            shown = {name: getattr(self.config, f"test_{name}") for name in ("crop", "crop_pct", "resize")}
            batch["image"][row] = decode.test_image(image, self.size, **shown)

    return self._decoder.run(fill, max(0, stop - first), lambda: batch)
