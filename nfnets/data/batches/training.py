"""Batches as a pure function of (seed, step): the same images, crops and mixtures for every number of processes and threads."""

import hashlib
import threading
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from nfnets.config import DataConfig
from nfnets.data.batches.decoder import DecodedBatches, ImageDecoder, Process
from nfnets.data.batches.order import GROUP, Order, Purpose, StreamKey, Streams
from nfnets.data.batches.prefetch import Batch, Pending
from nfnets.data.errors import CorruptRecord, DataError
from nfnets.data.images import augment, decode, mix
from nfnets.data.sources.base import Source

REMOTE_BLOCK = 32  # records; the shuffle block of sources in buckets, unless config.shuffle_block is set


def shuffle_block(config: DataConfig, source: Source) -> int:
  """Returns the number of records that stay together in the shuffled order; the order of a run depends on it."""
  return config.shuffle_block or (REMOTE_BLOCK if source.remote else 1)


class TrainBatches(DecodedBatches):
  """`batches[step]` → {"image": uint8 [rows, S, S, 3], "label": int32 [rows]}; any step, in any order.

  Where images are mixed there are also "mix_label" int32 [rows] and "ratio" float32 [rows], the share of "label". `rows`
  are this process's rows of the global batch. An image's crop, mixture and augmentation depend on its (seed, epoch,
  record) alone. Reading a batch raises DataError when too many records are corrupt.

  Args:
    source: the images.
    config: how they are cropped, augmented and mixed; its sizes and RandAugment fields are filled in.
    batch: rows of the global batch.
    seed: the seed of the run, < 2**32.
    process: (index, count); each process makes its own rows of the global batch.
    say: called with a line about every corrupt record.

  Raises:
    DataError: `batch` does not suit the mixing, the repeats or the processes, or the images are not of the wanted size.
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
    self._policy = _augmentation_policy(config)
    super().__init__(
      ImageDecoder(source, config, config.image_size, say, resized=config.train_crop != "none", field="image_size")
    )
    self.config, self._process, self._local = config, process, threading.local()
    self._batch, self._seed = batch, seed
    self._distinct = batch // config.repeats  # different images in a batch
    self._mixes = config.mix != "none"
    block = shuffle_block(config, source)
    self._order = Order(len(source), seed, block=block)
    self._partners = Order(len(source), seed, purpose=Purpose.PARTNER, block=block)
    self._has_second_stream = self._mixes and config.mix_with == "second"
    self._orders = [self._order, self._partners] if self._has_second_stream else [self._order]
    self._window = GROUP * block  # positions whose records lie in the same blocks
    self._prefetched = 0  # the position up to which the source of a bucket knows what is needed

  def __getitem__(self, step: int) -> Batch:
    return self.start(step).result()

  def start(self, step: int) -> Pending:
    """Lets the threads begin with a batch; `result()` waits for it."""
    per_process = self._batch // self._process[1]
    first = self._process[0] * per_process
    # Whole pairs are mixed: a row of a neighbouring process may be needed before and after our own.
    before, after = (first % 2, (first + per_process) % 2) if self._mixes else (0, 0)
    rows = np.arange(first - before, first + per_process + after)
    keys = self._keys(self._order, Purpose.IMAGE, step, rows)
    partner_keys = self._keys(self._partners, Purpose.PARTNER_IMAGE, step, rows) if self._has_second_stream else None
    if self.source.remote:
      self._prefetch_records(step, rows)
    batch = self._empty_batch(len(rows))

    def fill(start: int, stop: int) -> None:
      streams = self._thread_streams()
      if not self._mixes:
        for i in range(start, stop):
          self._fill_row(batch, i, keys[i], streams)
        return
      for i in range(start, stop, 2):
        pair_partner_keys = None if partner_keys is None else partner_keys[i : i + 2]
        self._fill_pair(batch, i, int(rows[i]) // 2, keys[i : i + 2], pair_partner_keys, streams)

    own_rows = lambda: {name: values[before : before + per_process] for name, values in batch.items()}
    return self._decoder.run(fill, len(rows), own_rows)

  def order_digest(self, step: int) -> str:
    """Returns 16 hex digits of the order of the epoch after the epoch in which `step` begins.

    They are the start of the SHA-256 of the record numbers, int32 little-endian, followed by the partners' where images
    are mixed with a second stream. Two machines that shuffle alike have the same digest. The epochs in use stay kept.
    """
    epoch = step * self._distinct // len(self.source) + 1
    return hashlib.sha256(b"".join(order.shuffled(epoch).astype("<i4").tobytes() for order in self._orders)).hexdigest()[:16]

  # ---- which images

  def _keys(self, order: Order, purpose: Purpose, step: int, rows: np.ndarray) -> list[StreamKey]:
    """Returns the stream of each row's image; a key's `record` is the number of the image."""
    epochs, records = order.at(self._positions(step, rows))
    copies = rows // self._distinct
    images = zip(epochs.tolist(), records.tolist(), copies.tolist(), strict=True)
    return [StreamKey(purpose, self._seed, *image) for image in images]

  def _positions(self, step: int, rows: np.ndarray) -> np.ndarray:
    """Returns the positions of rows in the endless stream of images, int64 [rows]."""
    return step * self._distinct + rows % self._distinct

  def _prefetch_records(self, step: int, rows: np.ndarray) -> None:
    """Tells the source of a bucket which records come next, in whole windows of the shuffle: their blocks lie together."""
    steps_ahead = 1 + -(-self._window // self._distinct)
    position, stop = step * self._distinct, (step + 3 * steps_ahead) * self._distinct
    stop -= stop % len(self.source) % self._window
    begin = self._prefetched if position < self._prefetched <= stop else position
    if begin < position + steps_ahead * self._distinct:
      by_step = [self._positions(later, rows) for later in range(begin // self._distinct, -(-stop // self._distinct))]
      new = [positions[(positions >= begin) & (positions < stop)] for positions in by_step]
      self.source.prefetch(np.concatenate([order.at(positions)[1] for positions in new for order in self._orders]))
      self._prefetched = stop

  # ---- filling rows, in the decoding threads

  def _thread_streams(self) -> Streams:
    """Returns this thread's own random numbers."""
    if not hasattr(self._local, "streams"):
      self._local.streams = Streams()
    return self._local.streams

  def _empty_batch(self, rows: int) -> Batch:
    batch = {"image": np.empty((rows, self.size, self.size, 3), np.uint8), "label": np.empty(rows, np.int32)}
    if self._mixes:
      batch |= {"mix_label": np.empty(rows, np.int32), "ratio": np.ones(rows, np.float32)}
    return batch

  def _fill_row(self, batch: Batch, row: int, key: StreamKey, streams: Streams) -> None:
    """Fills a row of a batch that is not mixed."""
    batch["label"][row] = self._load(key, streams, batch["image"][row])
    self._augment(batch["image"][row], streams.of(key._replace(purpose=Purpose.AUGMENT)))

  def _fill_pair(
    self, batch: Batch, row: int, pair: int, keys: list[StreamKey], partner_keys: list[StreamKey] | None, streams: Streams
  ) -> None:
    """Fills rows `row` and `row + 1`: each is mixed with the other row or with an image of the second stream.

    Args:
      batch: what is filled.
      row: the first of the two rows within `batch`.
      pair: the number of the pair within the global batch, which chooses between mixup and cutmix.
      keys: the streams of the two images.
      partner_keys: those of the second stream's images; None mixes the two rows with each other.
      streams: this thread's random numbers.
    """
    images, labels = self._load_pair(keys, streams)
    if partner_keys is None:
      partners, partner_labels = images[::-1], labels[::-1]
    else:
      partners, partner_labels = self._load_pair(partner_keys, streams)
    if self.config.augment_before_mix:
      self._augment_all(images, keys, Purpose.AUGMENT, streams)
      if partner_keys is not None:
        self._augment_all(partners, partner_keys, Purpose.PARTNER_AUGMENT, streams)
    mixture = self.config.mix if self.config.mix != "mixup_cutmix" else ("mixup", "cutmix")[pair % 2]
    own = slice(row, row + 2)
    batch["label"][own], batch["mix_label"][own] = labels, partner_labels
    for i, (image, partner, key) in enumerate(zip(images, partners, keys, strict=True), row):
      mixed, batch["ratio"][i] = self._mix(mixture, image, partner, streams.of(key._replace(purpose=Purpose.MIX)))
      batch["image"][i] = mixed
    if not self.config.augment_before_mix:
      self._augment_all(list(batch["image"][own]), keys, Purpose.AUGMENT, streams)

  def _load_pair(self, keys: list[StreamKey], streams: Streams) -> tuple[list[np.ndarray], list[int]]:
    """Loads two images: (uint8 [S, S, 3] each, their labels)."""
    images = [np.empty((self.size, self.size, 3), np.uint8) for _ in keys]
    return images, [self._load(key, streams, image) for key, image in zip(keys, images, strict=True)]

  def _load(self, key: StreamKey, streams: Streams, out: np.ndarray) -> int:
    """Writes the cropped, shifted and mirrored image of `key.record` into `out`, uint8 [S, S, 3]; returns its label.

    The next record that can be read replaces a corrupt one, and is cropped as the corrupt one would have been.
    """
    count = len(self.source)
    for index in (number % count for number in range(key.record, key.record + count)):
      try:
        image, label = self._decoder.pixels(index)
        break
      except CorruptRecord as error:
        self._decoder.note_corrupt(index, error, "replaced by the next")
    else:
      raise DataError(f"no image of {self.source.name} can be decoded")
    rng, config = streams.of(key), self.config
    with self._decoder.timed("decode"):
      if config.train_crop == "inception":
        height, width = image.shape[:2]
        box = decode.inception_box(height, width, self.size, rng, config.crop_area, config.crop_aspect)
        decode.crop_and_resize(image, box, out)
      else:
        image = self._decoder.as_stored(image, index, "train_crop")
        out[:] = decode.shift(image, *rng.integers(-config.shift, config.shift + 1, 2)) if config.shift else image
      if config.flip and rng.random() < 0.5:
        cv2.flip(out, 1, dst=out)
    return label

  def _augment(self, image: np.ndarray, rng: np.random.Generator) -> None:
    """Augments an image in place."""
    if self._policy is None:
      return
    with self._decoder.timed("augment"):
      image[:] = self._policy(image, rng)

  def _augment_all(self, images: Sequence[np.ndarray], keys: list[StreamKey], purpose: Purpose, streams: Streams) -> None:
    for image, key in zip(images, keys, strict=True):
      self._augment(image, streams.of(key._replace(purpose=purpose)))

  def _mix(self, mixture: str, image: np.ndarray, partner: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Mixes an image with its partner by "mixup" or "cutmix": (a new image, the share of `image` in it)."""
    with self._decoder.timed("mix"):
      if mixture == "mixup":
        ratio = mix.mixup_ratio(rng, self.config.mixup_alpha)
        return mix.mixup(image, partner, ratio), ratio
      return mix.cutmix(image, partner, mix.cutmix_box(self.size, self.size, rng))


def _augmentation_policy(config: DataConfig) -> Callable[[np.ndarray, np.random.Generator], np.ndarray] | None:
  """Returns the policy that `config.augment` names, as a function of (image, rng); None for "none"."""
  if config.augment == "none":
    return None
  if config.augment == "autoaugment":
    return augment.autoaugment
  layers, magnitude = config.randaugment_layers, config.randaugment_magnitude
  if layers is None or magnitude is None:
    raise DataError("config.data.randaugment_layers and randaugment_magnitude are unset, and the model has none of its own")
  return lambda image, rng: augment.randaugment(image, rng, layers=layers, magnitude=magnitude)
