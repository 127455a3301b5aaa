"""Describes a dataset: its records, pictures of its images, and whether every record can be read."""

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import BinaryIO

import cv2
import numpy as np

from nfnets.config import DataConfig
from nfnets.data.batches.prefetch import cores
from nfnets.data.batches.training import TrainBatches
from nfnets.data.errors import CorruptRecord, DataError
from nfnets.data.sources.base import Source

Progress = Callable[[int], None]  # called with the number of records that are done so far
SAMPLE = 200  # records whose sizes are measured
ROWS, COLUMNS = 5, 8  # of a grid of pictures
_CELL = 160  # side of a picture in the grid, pixels
_COUNTED_BYTES = 1 << 30  # the labels of larger splits are counted in the sample only
_CHUNK = 16  # records that one task of a thread reads


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
  """The contents of a split.

  Attributes:
    name: the dataset.
    split: the split expression.
    records: their number.
    class_names: the name of each class, by label.
    heights: int64 [sampled records that can be read], pixels.
    widths: int64 [the same], pixels.
    bytes: int64 [the same], of the stored image.
    counts: int64 [classes]; records of each class among `labels_read`.
    labels_read: the number of records whose labels were counted.
    corrupt: what is wrong with each corrupt record of the sample.
  """

  name: str
  split: str
  records: int
  class_names: tuple[str, ...]
  heights: np.ndarray
  widths: np.ndarray
  bytes: np.ndarray
  counts: np.ndarray
  labels_read: int
  corrupt: tuple[str, ...]

  def lines(self) -> list[str]:
    """Returns the summary for people, a fact in each line."""
    lines = [f"{self.name} {self.split}: {self.records:,} records, {len(self.class_names):,} classes"]
    if len(self.bytes):
      lines.append(
        f"  {len(self.bytes):,} images looked at (min / median / max): height {_range(self.heights)}, "
        f"width {_range(self.widths)}, mean {self.bytes.mean():,.0f} bytes"
      )
    absent = int((self.counts == 0).sum())
    counted = "all" if self.labels_read == self.records else f"{self.labels_read:,} evenly spaced"
    lines.append(
      f"  images a class (min / median / max), {counted} records: {_range(self.counts)}"
      + (f"; {absent:,} classes have none" if absent else "")
    )
    return lines + [f"  corrupt: {error}" for error in self.corrupt]


@dataclasses.dataclass(frozen=True, slots=True)
class Checked:
  """The result of `verify`. corrupt: the address and the fault of each corrupt record; bytes: of the readable images."""

  split: str
  records: int
  corrupt: tuple[str, ...]
  bytes: int


def known_splits(config: DataConfig) -> dict[str, int]:
  """Returns the number of records of each split in the metadata; empty for datasets that TFDS has not prepared."""
  if config.name in ("digits", "synthetic", "folder"):
    return {}
  from nfnets.data.sources.tfds import open_metadata

  return {name: info.num_examples for name, info in open_metadata(config).splits.items()}


def summarize(source: Source) -> Summary:
  """Summarizes up to 200 evenly spaced images; counts the labels of all records, unless the split is large or remote."""
  sample = _spread(len(source), SAMPLE)
  if source.remote:
    source.prefetch(np.asarray(sample))
  corrupt, measured = [], []
  with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
    for measures in pool.map(lambda index: _measure(source, index), sample):
      if isinstance(measures, str):
        corrupt.append(measures)
      else:
        measured.append(measures)
    heights, widths, sizes, labels = np.asarray(measured, np.int64).reshape(-1, 4).T
    labels_read = len(labels)
    if not source.remote and len(sample) < len(source) and sizes.sum() / max(1, labels_read) * len(source) <= _COUNTED_BYTES:
      every_label = pool.map(lambda index: _label(source, index), range(len(source)))
      labels, labels_read = np.asarray([label for label in every_label if label is not None], np.int64), len(source)
  return Summary(
    name=source.name,
    split=source.split,
    records=len(source),
    class_names=source.class_names,
    heights=heights,
    widths=widths,
    bytes=sizes,
    counts=np.bincount(labels, minlength=source.num_classes),
    labels_read=labels_read,
    corrupt=tuple(corrupt),
  )


def verify(
  source: Source,
  *,
  threads: int | None = None,
  progress: Progress = lambda done: None,
  on_corrupt: Callable[[str], None] = lambda error: None,
) -> Checked:
  """Reads every record, compares its checksums and decodes its image.

  Args:
    source: the records.
    threads: how many read at once; None is one for each core, or 32 for a bucket.
    progress: called with the number of records that are done.
    on_corrupt: called with the address and the fault of each corrupt record as soon as it is found.
  """

  def check(start: int) -> tuple[list[str], int]:
    errors, size = [], 0
    for index in range(start, min(start + _CHUNK, len(source))):
      try:
        record = source[index]
        source.pixels(index, record)
        size += _size(record.image)
      except DataError as error:
        errors.append(str(error))
    return errors, size

  corrupt, total = [], 0
  pool = concurrent.futures.ThreadPoolExecutor(threads or (32 if source.remote else cores()))
  try:
    jobs = [pool.submit(check, start) for start in range(0, len(source), _CHUNK)]
    for done, job in enumerate(jobs, 1):
      errors, size = job.result()
      for error in errors:
        on_corrupt(error)
      corrupt += errors
      total += size
      progress(min(done * _CHUNK, len(source)))
  finally:
    pool.shutdown(cancel_futures=True)
  return Checked(split=source.split, records=len(source), corrupt=tuple(corrupt), bytes=total)


# ---- pictures


def stored_pictures(source: Source) -> list[tuple[np.ndarray, str]]:
  """Returns (uint8 [H, W, 3], class name) of evenly spaced records, as stored; corrupt ones are left out."""
  pictures = []
  for index in _spread(len(source), ROWS * COLUMNS):
    try:
      record = source[index]
      image = source.pixels(index, record)
    except CorruptRecord:
      continue
    pictures.append((image, source.class_names[record.label]))
  return pictures


def training_pictures(
  source: Source, config: DataConfig, *, seed: int, say: Callable[[str], None] = print
) -> list[tuple[np.ndarray, str]]:
  """Returns (uint8 [S, S, 3], class names and shares) of the first batch that training would see.

  Args:
    source: the training images.
    config: how they are cropped, augmented and mixed; its RandAugment fields are filled in.
    seed: the seed of the run.
    say: called with a line about every corrupt record.
  """
  if config.image_size is None and config.train_crop != "none":
    config = dataclasses.replace(config, image_size=224)
  multiple = math.lcm(2, config.repeats)
  batch = -(-ROWS * COLUMNS // multiple) * multiple
  batches = TrainBatches(source, config, batch=batch, seed=seed, say=say)
  try:
    first = batches[0]
  finally:
    batches.close()
  names, pictures = source.class_names, []
  for i, (image, label) in enumerate(zip(first["image"], first["label"], strict=True)):
    text = names[label]
    if "ratio" in first and first["ratio"][i] < 1:
      ratio = float(first["ratio"][i])
      text = f"{ratio:.0%} {_short(text, 16)}\n{1 - ratio:.0%} {_short(names[first['mix_label'][i]], 16)}"
    pictures.append((image, text))
  return pictures[: ROWS * COLUMNS]


def draw(path: str | BinaryIO, grids: Sequence[tuple[str, Sequence[tuple[np.ndarray, str]]]]) -> None:
  """Writes a PNG with grids of pictures below each other.

  Args:
    path: the file, by its name or open.
    grids: (title, pictures) of each grid; a picture is (uint8 [H, W, 3], the text above it).

  Raises:
    DataError: the file cannot be written.
  """
  from matplotlib.figure import Figure

  rows = [-(-len(pictures) // COLUMNS) for _, pictures in grids]
  cell_width, cell_height, title_height, size = 1.7, 2.05, 0.5, 1.6  # inches; size: the side of a picture
  width, height = cell_width * COLUMNS, sum(cell_height * count + title_height for count in rows)
  figure, top = Figure(figsize=(width, height), dpi=100), height
  for count, (title, pictures) in zip(rows, grids, strict=True):
    figure.text(0.5, (top - title_height * 0.6) / height, title, ha="center", fontsize=11, parse_math=False)
    top -= title_height
    for i, (image, text) in enumerate(pictures):
      left = cell_width * (i % COLUMNS) + (cell_width - size) / 2
      bottom = top - cell_height * (i // COLUMNS + 1) + 0.05
      axes = figure.add_axes((left / width, bottom / height, size / width, size / height))
      axes.set_axis_off()
      axes.imshow(cell(image), interpolation="nearest")
      axes.set_title("\n".join(_short(line, 22) for line in text.split("\n")), fontsize=8, parse_math=False)
    top -= cell_height * count
  try:
    figure.savefig(path, format="png")
  except OSError as error:
    raise DataError(f"the picture {path} cannot be written: {error.strerror or error}") from error


def cell(image: np.ndarray) -> np.ndarray:
  """Cuts out the central square and resizes it to a cell of the grid, uint8 [160, 160, 3]."""
  side = min(image.shape[:2])
  top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
  square = np.ascontiguousarray(image[top : top + side, left : left + side])
  return cv2.resize(square, (_CELL, _CELL), interpolation=cv2.INTER_AREA if side > _CELL else cv2.INTER_NEAREST)


def _short(text: str, length: int) -> str:
  """Cuts a text to at most `length` characters."""
  return text if len(text) <= length else text[: length - 1] + "…"


# ---- records


def _spread(count: int, limit: int) -> list[int]:
  """Returns at most `limit` evenly spaced numbers from 0 to count - 1."""
  return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int)).tolist()


def _measure(source: Source, index: int) -> tuple[int, int, int, int] | str:
  """Returns (height, width, bytes, label) of a record, or what is wrong with it."""
  try:
    record = source[index]
    image = source.pixels(index, record)
  except DataError as error:
    return str(error)
  height, width = image.shape[:2]
  return height, width, _size(record.image), record.label


def _label(source: Source, index: int) -> int | None:
  """Returns the label of a record; None if the record is corrupt."""
  try:
    return source[index].label
  except DataError:
    return None


def _size(image: bytes | np.ndarray) -> int:
  """Returns the bytes of a stored image."""
  return len(image) if isinstance(image, bytes) else image.nbytes


def _range(values: np.ndarray) -> str:
  """Returns "least / median / most" of the values."""
  return f"{values.min():,} / {np.median(values):,.0f} / {values.max():,}"
