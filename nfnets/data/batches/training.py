"""Batches as a pure function of (seed, step): the same images, crops and mixtures for every number of processes and threads."""

import hashlib
import threading
from collections.abc import Callable

import cv2
import numpy as np

from nfnets.config import DataConfig
from nfnets.data.batches.decoder import DecodedBatches, ImageDecoder, Process
from nfnets.data.batches.order import GROUP, Order, Purpose, StreamKey, Streams
from nfnets.data.batches.prefetch import Batch, Pending
from nfnets.data.errors import CorruptRecord, DataError
from nfnets.data.images import augment, decode, mix
from nfnets.data.sources.base import Source

REMOTE_BLOCK = 32


def shuffle_block(config: DataConfig, source: Source) -> int:
  """Records that stay together in the shuffled order; the order of a run follows from it."""
  return config.shuffle_block or (REMOTE_BLOCK if source.remote else 1)


class TrainBatches(DecodedBatches):
  """`batches[step]` → {"image": uint8 [rows, S, S, 3], "label": int32 [rows]}; any step, in any order.

  Where images are mixed also "mix_label" int32 [rows] and "ratio" float32 [rows], the share of "label". `rows` are this
  process's of the global batch. An image's crop, mixture and augmentation depend on (seed, epoch, record) alone.
  Raises DataError where there is nothing to be replaced with.
  """

  def __init__(
    self,
    source: Source,
    config: DataConfig,
    *,
    batch: int,
    seed: int,
    process: Process = (0, 1),
    say: Callable[[str], None] = print,
  ):
    if config.mix != "none" and batch % 2:
      raise DataError(f"config.batch={batch} is odd, but images are mixed with their neighbours (config.data.mix={config.mix})")
    if batch % config.repeats or config.repeats > 1 and batch // config.repeats < 2:
      raise DataError(f"config.batch={batch} does not hold images config.data.repeats={config.repeats} times each")
    if batch % process[1]:
      raise DataError(f"config.batch={batch} is not divisible by the {process[1]} processes")
    if config.augment == "randaugment" and None in (config.randaugment_layers, config.randaugment_magnitude):
      raise DataError("config.data.randaugment_layers and randaugment_magnitude are unset, and the model has none of its own")
    super().__init__(
      ImageDecoder(source, config, config.image_size, say, resized=config.train_crop != "none", field="image_size")
    )
    self.config, self._process, self._local = config, process, threading.local()
    self._batch, self._seed = batch, seed
    block = shuffle_block(config, source)
    self._order = Order(len(source), seed, block=block)
    self._partners = Order(len(source), seed, purpose=Purpose.PARTNER, block=block)
    self._window, self._hinted = GROUP * block, 0

  def __getitem__(self, step: int) -> Batch:
    return self.start(step).result()

  def start(self, step: int) -> Pending:
    """Lets the threads begin with a batch; `result()` waits for it."""
    per_process = self._batch // self._process[1]
    first = self._process[0] * per_process
    skipped, missing = (first % 2, (first + per_process) % 2) if self._mixes else (0, 0)
    rows = np.arange(first - skipped, first + per_process + missing)  # whole pairs
    keys = self._keys(self._order, Purpose.IMAGE, step, rows)
    partner_keys = self._keys(self._partners, Purpose.PARTNER_IMAGE, step, rows) if self._second else None
    if self.source.remote:
      self._hint(step, rows)
    batch = self._empty_batch(len(rows))

    def fill(start: int, stop: int) -> None:
      if not self._mixes:
        for i in range(start, stop):
          self._fill_row(batch, i, keys[i])
        return
      for i in range(start, stop, 2):
        seconds = None if partner_keys is None else partner_keys[i : i + 2]
        self._mix_pair(batch, i, int(rows[i]) // 2, keys[i : i + 2], seconds, self._streams())

    own_rows = lambda: {name: values[skipped : skipped + per_process] for name, values in batch.items()}
    return self._decoder.run(fill, len(rows), own_rows)

  def _keys(self, order: Order, purpose: Purpose, step: int, rows: np.ndarray) -> list[StreamKey]:
    """The stream of each row's image; a key's `record` is the image itself."""
    epochs, records = order.at(self._positions(step, rows))
    copies = rows // (self._batch // self.config.repeats)
    places = zip(epochs.tolist(), records.tolist(), copies.tolist(), strict=True)
    return [StreamKey(purpose, self._seed, *place) for place in places]

  def _empty_batch(self, rows: int) -> Batch:
    batch = {"image": np.empty((rows, self.size, self.size, 3), np.uint8), "label": np.empty(rows, np.int32)}
    if self._mixes:
      batch |= {"mix_label": np.empty(rows, np.int32), "ratio": np.ones(rows, np.float32)}
    return batch

  def _fill_row(self, batch: Batch, row: int, key: StreamKey) -> None:
    """Fills a row of a batch that is not mixed."""
    streams = self._streams()
    image, batch["label"][row] = self._load(key.record, key, streams, batch["image"][row])
    self._augment(image, streams.of(key._replace(purpose=Purpose.AUGMENT)), image)

  @property
  def _mixes(self) -> bool:
    return self.config.mix != "none"

  def order_digest(self, step: int) -> str:
    """16 hex digits that follow from the order of the epoch after the one that the first image of `step` is of.

    SHA-256 of the record numbers, int32 little-endian, and of the partners' where images are mixed with a second stream.
    Two machines that shuffle alike have the same digest. The epochs in use are left as they are.
    """
    epoch = step * (self._batch // self.config.repeats) // len(self.source) + 1
    orders = [self._order] + [self._partners] * self._second
    return hashlib.sha256(b"".join(order.shuffled(epoch).astype("<i4").tobytes() for order in orders)).hexdigest()[:16]

  def next_corrupt(self) -> int | None:
    """The number of a record that this process found corrupt and that was not handed out before; None if there is none."""
    try:
      return self._decoder.unreported.popleft()
    except IndexError:
      return None

  @property
  def _second(self) -> bool:
    return self._mixes and self.config.mix_with == "second"

  def _positions(self, step: int, rows: np.ndarray) -> np.ndarray:
    distinct = self._batch // self.config.repeats
    return step * distinct + rows % distinct

  def _hint(self, step: int, rows: np.ndarray) -> None:
    """Tells the source of a bucket what comes next, whole windows of the shuffle at a time: their blocks lie together."""
    distinct, n = self._batch // self.config.repeats, len(self.source)
    ahead = 1 + -(-self._window // distinct)  # steps
    now, until = step * distinct, (step + 3 * ahead) * distinct
    until -= until % n % self._window
    begin = self._hinted if now < self._hinted <= until else now
    if begin < now + ahead * distinct:
      order = [self._order] + [self._partners] * self._second
      steps = [self._positions(at, rows) for at in range(begin // distinct, -(-until // distinct))]
      positions = [at[(at >= begin) & (at < until)] for at in steps]
      self.source.prefetch(np.concatenate([each.at(at)[1] for at in positions for each in order]))
      self._hinted = until

  def _streams(self) -> Streams:
    if not hasattr(self._local, "streams"):
      self._local.streams = Streams()
    return self._local.streams

  def _load(self, index: int, key: StreamKey, streams: Streams, out: np.ndarray) -> tuple[np.ndarray, int]:
    """Writes the cropped, shifted and mirrored image of a record into `out`; (out, label).

    A corrupt record's place is taken by the next one that can be read, cropped as the corrupt one would have been.
    """
    for at in range(index, index + len(self.source)):
      try:
        image, label = self._decoder.pixels(at % len(self.source))
        break
      except CorruptRecord as error:
        self._decoder.note_corrupt(at % len(self.source), error, "replaced by the next")
    else:
      raise DataError(f"no image of {self.source.name} can be decoded")
    rng, config = streams.of(key), self.config
    with self._decoder.timed("decode"):
      if config.train_crop == "inception":
        box = decode.inception_box(*image.shape[:2], self.size, rng, config.crop_area, config.crop_aspect)
        decode.crop_and_resize(image, box, out)
      else:
        image = self._decoder.as_stored(image, at % len(self.source), "train_crop")
        out[:] = decode.shift(image, *rng.integers(-config.shift, config.shift + 1, 2)) if config.shift else image
      if config.flip and rng.random() < 0.5:
        cv2.flip(out, 1, dst=out)
    return out, label

  def _augment(self, image: np.ndarray, rng: np.random.Generator, out: np.ndarray) -> None:
    config = self.config
    if config.augment == "none":
      return
    with self._decoder.timed("augment"):
      if config.augment == "randaugment":
        out[:] = augment.randaugment(image, rng, layers=config.randaugment_layers, magnitude=config.randaugment_magnitude)
      else:
        out[:] = augment.autoaugment(image, rng)

  def _mix_pair(
    self, batch: Batch, i: int, pair: int, keys: list[StreamKey], seconds: list[StreamKey] | None, streams: Streams
  ) -> None:
    """Rows i and i + 1: each mixed with the other one or with an image of the second stream."""
    shape = (self.size, self.size, 3)
    images, labels = zip(*(self._load(key.record, key, streams, np.empty(shape, np.uint8)) for key in keys), strict=True)
    if seconds is None:
      partners, mix_labels, partner_keys = images[::-1], labels[::-1], keys[::-1]
    else:
      partners, mix_labels = zip(
        *(self._load(key.record, key, streams, np.empty(shape, np.uint8)) for key in seconds), strict=True
      )
      partner_keys = seconds
    if self.config.augment_before_mix:
      for image, key in [*zip(images, keys, strict=True), *([] if seconds is None else zip(partners, partner_keys, strict=True))]:
        purpose = Purpose.AUGMENT if key.purpose == Purpose.IMAGE else Purpose.PARTNER_AUGMENT
        self._augment(image, streams.of(key._replace(purpose=purpose)), image)
    kind = self.config.mix if self.config.mix != "mixup_cutmix" else ("mixup", "cutmix")[pair % 2]
    for n, (image, partner, key) in enumerate(zip(images, partners, keys, strict=True)):
      rng = streams.of(key._replace(purpose=Purpose.MIX))
      with self._decoder.timed("mix"):
        if kind == "mixup":
          ratio = mix.mixup_ratio(rng, self.config.mixup_alpha)
          mixed = mix.mixup(image, partner, ratio)
        else:
          mixed, ratio = mix.cutmix(image, partner, mix.cutmix_box(self.size, self.size, rng))
        batch["image"][i + n] = mixed
      batch["label"][i + n], batch["mix_label"][i + n], batch["ratio"][i + n] = labels[n], mix_labels[n], ratio
      if not self.config.augment_before_mix:
        self._augment(batch["image"][i + n], streams.of(key._replace(purpose=Purpose.AUGMENT)), batch["image"][i + n])
