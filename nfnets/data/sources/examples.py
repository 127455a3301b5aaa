"""Records that are serialized tf.Examples, in TFRecord shards or in array_record files."""

import abc
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from nfnets.data.errors import CorruptRecord, DataError, reason
from nfnets.data.sources.base import Record, Source
from nfnets.data.storage import tfrecord
from nfnets.data.storage.buckets import BucketReader
from nfnets.data.storage.example import parse_example
from nfnets.data.storage.index import RecordIndex
from nfnets.data.storage.tfrecord import FileReader

LARGEST = 1 << 30  # bytes of a record, of which there is one in memory for each thread


class Piece(NamedTuple):
  """A part of a shard. first: the number of its first record; taken: how many follow; count: how many the shard holds."""

  file: str
  first: int
  taken: int
  count: int


class _ExampleSource(Source):
  """Records that are serialized tf.Examples. keys: the names of the features that are the image and the label."""

  def __init__(self, name: str, split: str, class_names: Sequence[str], keys: tuple[str, str]):
    super().__init__(name, split, class_names)
    self._keys = keys

  @abc.abstractmethod
  def raw(self, index: int) -> bytes:
    """Reads a record as it is stored. Raises CorruptRecord."""

  def __getitem__(self, index: int) -> Record:
    raw = self.raw(index)
    self.check(index, raw)
    return self.record(index, raw)

  def payload(self, raw: bytes) -> bytes:
    """Returns the serialized tf.Example in what `raw` returned."""
    return raw

  def record(self, index: int, raw: bytes) -> Record:
    payload = self.payload(raw)
    try:
      features = parse_example(payload, self._keys)
    except ValueError as error:
      raise CorruptRecord(self.address(index), str(error)) from error
    image, label = features[self._keys[0]], features[self._keys[1]]
    if not isinstance(image, bytes) or not isinstance(label, int):
      raise CorruptRecord(self.address(index), f"its feature {self._keys[isinstance(image, bytes)]!r} has the wrong type")
    if not 0 <= label < len(self.class_names):
      raise DataError(
        f"{self.address(index)}: its label is {label}, not in [0, {self.num_classes}), the classes of {self.name} "
        f"(does the split {self.split!r} have labels?)"
      )
    return Record(image, label)

  def file_name(self, index: int) -> str:
    """Returns the feature `file_name`, as TFDS calls it."""
    try:
      name = parse_example(self.payload(self.raw(index)), ("file_name",))["file_name"]
    except ValueError:  # there is no such feature
      return ""
    return os.path.basename(name.decode(errors="replace")) if isinstance(name, bytes) else ""


class TFRecordSource(_ExampleSource):
  """Records of TFRecord shards; the checksums of length and payload are compared at every read.

  Args:
    name: the dataset's name.
    split: the split expression.
    class_names: the name of each class, by label.
    keys: the names of the features that are the image and the label.
    index: the positions of the shards' records.
    rows: the numbers of this source's records in the index, int [n].
    reader: reads the index's files.
    remote: whether they are in a bucket.
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
    reader: FileReader | BucketReader,
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

  def content(self) -> Iterable[bytes]:
    yield "\0".join(os.path.basename(file) for file in self._files).encode(errors="surrogateescape")
    yield from (array.astype("<i8").tobytes() for array in (self._file, self._offset, self._length))

  def prefetch(self, indices: np.ndarray) -> None:
    offsets = self._offset[indices] - tfrecord.HEADER  # exactly the ranges that `raw` reads
    lengths = self._length[indices] + (tfrecord.HEADER + tfrecord.FOOTER)
    self._reader.prefetch([*zip(self._file[indices].tolist(), offsets.tolist(), lengths.tolist(), strict=True)])

  def raw(self, index: int) -> bytes:
    """Reads the whole record: header, payload and footer."""
    file, offset, length = int(self._file[index]), int(self._offset[index]), int(self._length[index])
    if length > LARGEST:
      raise CorruptRecord(self.address(index), f"it has {length:,} bytes, more than the {LARGEST:,} that are read")
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
  """Records of array_record shards; that format's library compares its checksums at every read.

  Args:
    name: the dataset's name.
    split: the split expression.
    class_names: the name of each class, by label.
    keys: the names of the features that are the image and the label.
    source: an ArrayRecordDataSource of the pieces.
    pieces: the parts of shards that the split consists of, in order.
  """

  def __init__(
    self, name: str, split: str, class_names: Sequence[str], keys: tuple[str, str], *, source: Any, pieces: Sequence[Piece]
  ):
    super().__init__(name, split, class_names, keys)
    self._source, self._pieces = source, pieces
    self._ends = np.cumsum([piece.taken for piece in pieces])

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def address(self, index: int) -> str:
    number = int(np.searchsorted(self._ends, index, side="right"))
    piece = self._pieces[number]
    return f"{piece.file} (record {piece.first + index - (self._ends[number] - piece.taken) + 1} of {piece.count})"

  def content(self) -> Iterable[bytes]:
    for piece in self._pieces:
      yield f"{os.path.basename(piece.file)} {piece.first} {piece.taken} {piece.count}\0".encode(errors="surrogateescape")

  def close(self) -> None:
    self._source.__exit__(None, None, None)

  def raw(self, index: int) -> bytes:
    if not 0 <= index < len(self):
      raise IndexError(index)
    try:
      return self._source[int(index)]
    except Exception as error:  # array_record documents no error of its own
      raise CorruptRecord(self.address(index), f"cannot be read: {reason(error)}") from error
