"""Records that are serialized tf.Examples, in TFRecord shards or in array_record files."""

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np

from nfnets.data.errors import CorruptRecord, DataError, reason
from nfnets.data.sources.base import Record, Source
from nfnets.data.storage import tfrecord
from nfnets.data.storage.example import parse_example
from nfnets.data.storage.index import RecordIndex


class _ExampleSource(Source):
  """Records that are serialized tf.Examples; the features `keys` are the image and the label."""

  def __init__(self, name: str, split: str, class_names: Sequence[str], keys: tuple[str, str]):
    super().__init__(name, split, class_names)
    self._keys = keys

  @abc.abstractmethod
  def raw(self, index: int) -> bytes: ...

  def __getitem__(self, index: int) -> Record:
    raw = self.raw(index)
    self.check(index, raw)
    return self.record(index, raw)

  def payload(self, raw: bytes) -> bytes:
    """The serialized tf.Example in what `raw` returned."""
    return raw

  def record(self, index: int, raw: bytes) -> Record:
    payload = self.payload(raw)
    try:
      found = parse_example(payload, self._keys)
    except ValueError as error:
      raise CorruptRecord(self.address(index), str(error)) from error
    image, label = found[self._keys[0]], found[self._keys[1]]
    if not isinstance(image, bytes) or not isinstance(label, int):
      raise CorruptRecord(self.address(index), f"its feature {self._keys[isinstance(image, bytes)]!r} has the wrong type")
    if not 0 <= label < len(self.class_names):
      raise DataError(
        f"{self.address(index)}: its label is {label}, not in [0, {self.num_classes}), the classes of {self.name} "
        f"(does the split {self.split!r} have labels?)"
      )
    return Record(image, label)


class TFRecordSource(_ExampleSource):
  """Records of TFRecord shards in place; the checksums of length and payload are compared at every read.

  Args:
    rows: which records of the index, int [n].
    reader: a FileReader or BucketReader of the index's files.
  """

  def __init__(
    self,
    name: str,
    split: str,
    class_names: Sequence[str],
    keys: tuple[str, str],
    *,
    index: RecordIndex,
    rows: np.ndarray,
    reader: Any,
    remote: bool = False,
  ):
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
    return (
      f"{self._files[file]} at byte {self._offset[index] - tfrecord.HEADER} "
      f"(record {self._number[index] + 1} of {self._counts[file]})"
    )

  def prefetch(self, indices: np.ndarray) -> None:
    offsets = self._offset[indices] - tfrecord.HEADER  # the ranges that `raw` reads, to the byte
    lengths = self._length[indices] + (tfrecord.HEADER + tfrecord.FOOTER)
    self._reader.prefetch([*zip(self._file[indices].tolist(), offsets.tolist(), lengths.tolist(), strict=True)])

  def raw(self, index: int) -> bytes:
    """The whole record: header, payload and footer."""
    file, offset, length = int(self._file[index]), int(self._offset[index]), int(self._length[index])
    try:
      return self._reader.read(file, offset - tfrecord.HEADER, tfrecord.HEADER + length + tfrecord.FOOTER)
    except OSError as error:
      raise CorruptRecord(self.address(index), f"cannot be read: {reason(error)}") from error

  def check(self, index: int, raw: bytes) -> None:
    try:
      tfrecord.check_crc(raw)
    except ValueError as error:
      raise CorruptRecord(self.address(index), str(error)) from error

  def payload(self, raw: bytes) -> bytes:
    return raw[tfrecord.HEADER : -tfrecord.FOOTER]

  def close(self) -> None:
    self._reader.close()


class ArrayRecordSource(_ExampleSource):
  """Records of array_record shards, whose library compares checksums of its own at every read.

  pieces: (file, first record, records taken, records in the file) of each in turn.
  """

  def __init__(
    self,
    name: str,
    split: str,
    class_names: Sequence[str],
    keys: tuple[str, str],
    *,
    source: Any,
    pieces: Sequence[tuple[str, int, int, int]],
  ):
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

  def raw(self, index: int) -> bytes:
    if not 0 <= index < len(self):
      raise IndexError(index)
    try:
      return self._source[int(index)]
    except Exception as error:  # array_record documents no error of its own
      raise CorruptRecord(self.address(index), f"cannot be read: {reason(error)}") from error
