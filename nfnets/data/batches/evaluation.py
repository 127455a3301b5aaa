"""Evaluation batches: every image of a split once, in order, the last batch padded and masked."""

from collections.abc import Callable, Iterator

import numpy as np

from nfnets.config import DataConfig
from nfnets.data.batches.decoder import DecodedBatches, ImageDecoder, Process
from nfnets.data.batches.prefetch import Batch, Pending, prefetch
from nfnets.data.errors import CorruptRecord
from nfnets.data.images import decode
from nfnets.data.sources.base import Source


class EvalBatches(DecodedBatches):
  """Iterates once, in order, over all images: TrainBatches' dicts with "mask" bool [rows], which says what counts.

  The last batch is padded with zeros. A corrupt record is left out by the mask, and said.
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

  def __iter__(self) -> Iterator[Batch]:
    yield from prefetch(self.start, 0, len(self))

  def start(self, step: int) -> Pending:
    first = step * self.batch + self._process[0] * self._rows
    stop = min(first + self._rows, len(self.source))
    made = {
      "image": np.zeros((self._rows, self.size, self.size, 3), np.uint8),
      "label": np.zeros(self._rows, np.int32),
      "mask": np.arange(first, first + self._rows) < stop,
    }
    if self.source.remote and first < stop:
      self.source.prefetch(np.arange(first, stop))

    def work(begin: int, end: int) -> None:
      for i in range(begin, end):
        try:
          image, made["label"][i] = self._decoder.pixels(first + i)
        except CorruptRecord as error:
          self._decoder.note_corrupt(first + i, error, "left out of the evaluation")
          made["mask"][i] = False
          continue
        with self._decoder.timed("decode"):
          crop = decode.TEST_CROPS.get(self.config.test_crop)
          made["image"][i] = crop(image, self.size) if crop else self._decoder.as_stored(image, first + i, "test_crop")

    return self._decoder.run(work, max(0, stop - first), lambda: made)
