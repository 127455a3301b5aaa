"""The order of the images and their random numbers: functions of the seed and the position alone."""

import enum
from typing import NamedTuple

import numpy as np


class Purpose(enum.IntEnum):
  """What a random stream is for; streams of different purposes never share a key.

  In the key's words, the lower four bits of a purpose are the highest byte and the bits above them precede the copy's number.
  """

  ORDER = 0  # the order of an epoch
  PARTNER = 1  # the order of the second stream, whose images others are mixed with
  IMAGE = 2  # an image's crop, shift and mirroring
  AUGMENT = 2 | 1 << 4
  MIX = 2 | 2 << 4
  PARTNER_IMAGE = 2 | 4 << 4  # like IMAGE, for an image of the second stream
  PARTNER_AUGMENT = 2 | 5 << 4


class StreamKey(NamedTuple):
  """The name of a stream of random numbers. seed < 2**32, epoch < 2**24, record < 2**40, copy < 2**20."""

  purpose: Purpose
  seed: int
  epoch: int
  record: int = 0
  copy: int = 0

  def words(self) -> list[int]:
    """Returns the 128-bit key of Philox as two words of 64 bits."""
    copy = self.copy | (self.purpose >> 4) << 20
    return [self.seed | copy << 32 | (self.purpose & 15) << 56, self.epoch << 40 | self.record]


GROUP = 16  # blocks whose records are shuffled among each other


class Order:
  """`order[epoch]` → int32 [n], a permutation of the records; the last epochs asked for are kept.

  Any thread may ask: the dict of kept epochs is replaced as a whole and never changed, so that at worst two threads
  shuffle the same epoch.

  Args:
    n: the number of records.
    seed: the seed of the run.
    purpose: ORDER or PARTNER.
    block: the number of consecutive records that stay near each other, so that a reader of a bucket can fetch whole
      blocks: blocks are shuffled, then the records of every 16 blocks. 1 shuffles all records.
  """

  def __init__(self, n: int, seed: int, *, purpose: Purpose = Purpose.ORDER, block: int = 1):
    self._n, self._seed, self._purpose, self._block = n, seed, purpose, block
    self._epochs: dict[int, np.ndarray] = {}

  def __getitem__(self, epoch: int) -> np.ndarray:
    records = self._epochs.get(epoch)
    if records is None:
      records = self.shuffled(epoch)
      neighbours = {number: order for number, order in self._epochs.items() if number in (epoch - 1, epoch + 1)}
      self._epochs = neighbours | {epoch: records}
    return records

  def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (epoch, record), each int64 [...], of positions in the endless stream in which epoch follows epoch."""
    epochs, offsets = np.divmod(positions, self._n)
    records = np.empty_like(offsets)
    for epoch in np.unique(epochs):
      in_epoch = epochs == epoch
      records[in_epoch] = self[int(epoch)][offsets[in_epoch]]
    return epochs, records

  def shuffled(self, epoch: int) -> np.ndarray:
    """Computes `order[epoch]` without keeping it."""
    rng = np.random.Generator(np.random.Philox(key=StreamKey(self._purpose, self._seed, epoch).words()))
    records = np.arange(self._n, dtype=np.int32)
    if self._block == 1:
      return rng.permutation(records)
    blocks = [records[start : start + self._block] for start in range(0, self._n, self._block)]
    blocks = [blocks[i] for i in rng.permutation(len(blocks))]
    return np.concatenate([rng.permutation(np.concatenate(blocks[i : i + GROUP])) for i in range(0, len(blocks), GROUP)])


class Streams:
  """Random numbers of single images, from one Generator: setting its state is four times as fast as making a new one.

  Not thread-safe.
  """

  def __init__(self) -> None:
    self._bits = np.random.Philox(key=0)
    self._fresh = self._bits.state
    self._generator = np.random.Generator(self._bits)

  def of(self, key: StreamKey) -> np.random.Generator:
    """Returns the generator at the start of a stream; it is the same object at every call."""
    self._fresh["state"]["key"][:] = key.words()
    self._bits.state = self._fresh
    return self._generator
