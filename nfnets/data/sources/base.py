"""The interface of a source of images, and a source of arrays in memory."""

import abc
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nfnets.data.errors import CorruptRecord, UnreadableImage
from nfnets.data.images import decode


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
  """An image and its class.

  image: the bytes of a JPEG, PNG or other file, or uint8 [height, width, 3]. label: in [0, num_classes).
  """

  image: bytes | np.ndarray
  label: int


class Source(abc.ABC):
  """len(source) records by number. Any number of threads may read at once; `close` it when all are done.

  Args:
    name: the dataset's name.
    split: the split expression, e.g. "train[:98%]".
    class_names: the name of each class, by label.

  Attributes:
    remote: whether reading waits for a network, so that `prefetch` pays.
    rules: which images are decoded, and how; `open_source` sets them.
  """

  remote: bool = False
  rules: decode.Rules = decode.DEFAULT_RULES

  def __init__(self, name: str, split: str, class_names: Sequence[str]):
    self.name, self.split, self.class_names = name, split, tuple(class_names)

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def __getitem__(self, index: int) -> Record:
    """Reads a record.

    Raises:
      CorruptRecord: this record cannot be read.
      DataError: its label is not in [0, num_classes).
    """

  @abc.abstractmethod
  def address(self, index: int) -> str:
    """Returns the file and the position of a record, for messages: "PATH at byte N (record I of M)", I from 1."""

  def file_name(self, index: int) -> str:
    """Returns what the image's file was called, without its folder; empty where that is not known. Raises CorruptRecord."""
    return ""

  @abc.abstractmethod
  def content(self) -> Iterable[bytes]:
    """Yields what tells these records from others without reading them all: names of files below the dataset's, lengths …"""

  def fingerprint(self) -> str:
    """Returns 16 hex digits of the classes, the number of records and `content`: the same wherever the dataset lies."""
    digest = hashlib.sha256("\0".join([*self.class_names, str(len(self))]).encode(errors="surrogateescape"))
    for part in self.content():
      digest.update(part)
    return digest.hexdigest()[:16]

  def pixels(self, index: int, record: Record) -> np.ndarray:
    """Decodes the record's image: uint8 [height, width, 3]. Raises CorruptRecord."""
    if isinstance(record.image, np.ndarray):
      return record.image
    try:
      return decode.pixels(record.image, self.rules)
    except UnreadableImage as error:
      raise CorruptRecord(self.address(index), str(error)) from error

  # ---- the three parts of source[index], separate so that each can be timed

  def raw(self, index: int) -> Any:
    """Reads a record as it is stored. Raises CorruptRecord."""
    return self[index]

  def check(self, index: int, raw: Any) -> None:
    """Compares the checksums in what `raw` returned, where the format has any. Raises CorruptRecord."""
    return None

  def record(self, index: int, raw: Any) -> Record:
    """Parses what `raw` returned. Raises CorruptRecord or DataError."""
    return raw

  def prefetch(self, indices: np.ndarray) -> None:
    """Tells which records are needed next, in this order; they are fetched ahead where reading waits for a network."""
    return None

  def close(self) -> None:
    """Closes files and connections; may be called twice."""
    return None


class ArraySource(Source):
  """Images in memory. images: uint8 [n, height, width, 3]; labels: int [n]."""

  def __init__(self, name: str, split: str, class_names: Sequence[str], images: np.ndarray, labels: np.ndarray):
    super().__init__(name, split, class_names)
    self._images, self._labels = images, labels

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> Record:
    return Record(self._images[index], int(self._labels[index]))

  def address(self, index: int) -> str:
    return f"{self.name} {self.split} (record {index + 1} of {len(self)})"

  def content(self) -> Iterable[bytes]:
    return self._images.tobytes(), self._labels.astype("<i4").tobytes()
