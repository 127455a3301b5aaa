"""Where images come from: scikit-learn's digits, noise, a folder of images, any prepared TFDS dataset, on disks or in buckets.

A source gives any record at once, encoded as it is stored; none needs TensorFlow, and nothing is ever downloaded.
"""
import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nfnets.config import DataConfig
from nfnets.data import decode, records
from nfnets.data.errors import CorruptRecord, DataError, reason
from nfnets.data.example import parse_example


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
  """image: the bytes of a JPEG, PNG …, or uint8 [height, width, 3]; label: in [0, num_classes)."""

  image: bytes | np.ndarray
  label: int


class Source(abc.ABC):
  """len(source) records by number. Any thread may read; `close` when none does any more.

  remote: whether reading waits for a network, so that `prefetch` pays.
  """

  remote: bool = False

  def __init__(self, name: str, split: str, class_names: Sequence[str]):
    self.name, self.split, self.class_names = name, split, tuple(class_names)

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @abc.abstractmethod
  def __len__(self) -> int:
    ...

  @abc.abstractmethod
  def __getitem__(self, index: int) -> Record:
    """Raises CorruptRecord when this record cannot be read, DataError when its label is not one of the classes."""
    ...

  @abc.abstractmethod
  def address(self, index: int) -> str:
    """Where a record lies, for messages: "PATH at byte N (record I of M)", I from 1."""
    ...

  def pixels(self, index: int, record: Record) -> np.ndarray:
    """The record's image, uint8 [height, width, 3]. Raises CorruptRecord."""
    if isinstance(record.image, np.ndarray):
      return record.image
    try:
      return decode.pixels(record.image)
    except decode.UnreadableImage as error:
      raise CorruptRecord(self.address(index), str(error)) from error

  def prefetch(self, indices: np.ndarray) -> None:
    """The records needed next, in this order; fetched ahead where reading waits for a network."""
    return None

  def verify(self, index: int) -> None:
    """Reads a record and checks its checksums where it has any. Raises CorruptRecord."""
    self[index]

  def close(self) -> None:
    """Closes files and connections; may be called twice."""
    return None


class ArraySource(Source):
  """images: uint8 [n, height, width, 3]; labels: int [n]."""

  def __init__(self, name: str, split: str, class_names: Sequence[str], images: np.ndarray, labels: np.ndarray):
    super().__init__(name, split, class_names)
    self._images, self._labels = images, labels

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> Record:
    return Record(self._images[index], int(self._labels[index]))

  def address(self, index: int) -> str:
    return f"{self.name} {self.split} (record {index + 1} of {len(self)})"


class _ExampleSource(Source):
  """Records that are serialized tf.Examples; the features `keys` are the image and the label."""

  def __init__(self, name: str, split: str, class_names: Sequence[str], keys: tuple[str, str]):
    super().__init__(name, split, class_names)
    self._keys = keys

  @abc.abstractmethod
  def _payload(self, index: int) -> bytes:
    ...

  def __getitem__(self, index: int) -> Record:
    payload = self._payload(index)
    try:
      found = parse_example(payload, self._keys)
    except ValueError as error:
      raise CorruptRecord(self.address(index), str(error)) from error
    image, label = found[self._keys[0]], found[self._keys[1]]
    if not isinstance(image, bytes) or not isinstance(label, int):
      raise CorruptRecord(self.address(index), f"its feature {self._keys[isinstance(image, bytes)]!r} has the wrong type")
    if not 0 <= label < len(self.class_names):
      raise DataError(f"{self.address(index)}: its label is {label}, not in [0, {self.num_classes}), the classes of {self.name} "
                      f"(a split without labels? config.data.*_split is {self.split!r})")
    return Record(image, label)


class TFRecordSource(_ExampleSource):
  """Records of TFRecord shards in place. rows: which of the index, int [n]; reader: a FileReader or BucketReader of its files."""

  def __init__(self, name: str, split: str, class_names: Sequence[str], keys: tuple[str, str], *, index: records.RecordIndex,
               rows: np.ndarray, reader: Any, remote: bool = False):
    super().__init__(name, split, class_names, keys)
    self.remote = remote
    self._files, self._reader = index.files, reader
    self._file, self._offset, self._length = index.file[rows], index.offset[rows], index.length[rows]
    self._counts = index.counts()
    self._number = rows - (np.cumsum(self._counts) - self._counts)[self._file]  # within its file

  def __len__(self) -> int:
    return len(self._file)

  def address(self, index: int) -> str:
    file = self._file[index]
    return (f"{self._files[file]} at byte {self._offset[index] - records.HEADER} "
            f"(record {self._number[index] + 1} of {self._counts[file]})")

  def prefetch(self, indices: np.ndarray) -> None:
    arrays = self._file[indices], self._offset[indices], self._length[indices]
    self._reader.prefetch([*zip(*(array.tolist() for array in arrays), strict=True)])

  def verify(self, index: int) -> None:
    try:
      records.check_crc(self._read(index, records.HEADER, records.FOOTER))
    except ValueError as error:
      if isinstance(error, DataError):
        raise
      raise CorruptRecord(self.address(index), str(error)) from error

  def close(self) -> None:
    self._reader.close()

  def _payload(self, index: int) -> bytes:
    return self._read(index, 0, 0)

  def _read(self, index: int, before: int, after: int) -> bytes:
    file, offset, length = int(self._file[index]), int(self._offset[index]), int(self._length[index])
    try:
      return self._reader.read(file, offset - before, before + length + after)
    except OSError as error:
      raise CorruptRecord(self.address(index), f"cannot be read: {reason(error)}") from error


class DataSource(_ExampleSource):
  """Records of array_record shards. pieces: (file, first record, records taken, records in the file) of each in turn."""

  def __init__(self, name: str, split: str, class_names: Sequence[str], keys: tuple[str, str], *, source: Any,
               pieces: Sequence[tuple[str, int, int, int]]):
    super().__init__(name, split, class_names, keys)
    self._source, self._pieces = source, pieces
    self._ends = np.cumsum([piece[2] for piece in pieces])

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def address(self, index: int) -> str:
    piece = int(np.searchsorted(self._ends, index, side="right"))
    file, first, taken, count = self._pieces[piece]
    return f"{file} (record {first + index - (self._ends[piece] - taken) + 1} of {count})"

  def close(self) -> None:
    self._source.__exit__(None, None, None)

  def _payload(self, index: int) -> bytes:
    if not 0 <= index < len(self):
      raise IndexError(index)
    try:
      return self._source[int(index)]
    except Exception as error:  # array_record documents no error of its own
      raise CorruptRecord(self.address(index), f"cannot be read: {reason(error)}") from error


def load(config: DataConfig, *, train: bool, progress: Callable[[str], None] = lambda line: None) -> Source:
  """The training or the test images. `progress` is told, in one line each, of what takes long.

  Raises DataError when the dataset is unknown or not prepared, cannot be read, is cut short, has no such split or feature,
  the split is empty, or `config.num_classes` disagrees with the data.
  """
  config.validate()
  split = config.train_split if train else config.test_split
  if config.name == "digits":
    found = _digits(split)
  elif config.name == "synthetic":
    found = _synthetic(config, split)
  elif config.name == "folder":
    from nfnets.data import folder
    found = folder.load(config.dir, split, progress)
  else:
    from nfnets.data import prepared
    found = prepared.load(config, split, progress)
  if not len(found):
    raise DataError(f"split {split!r} of {config.name} is empty (config.data.{'train' if train else 'test'}_split)")
  if config.num_classes not in (None, found.num_classes):
    raise DataError(f"config.data.num_classes={config.num_classes}, but {config.name} has {found.num_classes} classes "
                    f"(set it to {found.num_classes}, or leave it unset)")
  return found


def _digits(split: str) -> Source:
  """1,797 scans of handwritten digits, 8×8 pixels, 17 grey levels: a fixed stratified 80 % to train on, 20 % to test."""
  from sklearn import datasets, model_selection
  if split not in ("train", "test"):
    raise DataError(f"digits has the splits 'train' and 'test', got {split!r}")
  scans = datasets.load_digits()
  pixels = np.round(scans.images * (255 / 16)).astype(np.uint8)
  index = model_selection.train_test_split(np.arange(len(pixels)), test_size=0.2, random_state=0, stratify=scans.target)
  index = index[0] if split == "train" else index[1]
  images = np.repeat(pixels[index][..., None], 3, axis=-1)
  return ArraySource("digits", split, "0123456789", images, scans.target[index].astype(np.int32))


def _synthetic(config: DataConfig, split: str) -> Source:
  """256 images of noise, image_size pixels a side (32 if unset), num_classes classes (1000); the split seeds them."""
  size, classes = config.image_size or 32, config.num_classes or 1000
  rng = np.random.default_rng([*split.encode()])
  images, labels = rng.integers(0, 256, (256, size, size, 3), np.uint8), rng.integers(0, classes, 256).astype(np.int32)
  return ArraySource("synthetic", split, [*map(str, range(classes))], images, labels)
