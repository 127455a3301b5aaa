"""Looking at a dataset: what it holds, what its images look like, and whether every record can be read."""

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from nfnets.config import DataConfig
from nfnets.data.batches.prefetch import cores
from nfnets.data.batches.training import TrainBatches
from nfnets.data.errors import CorruptRecord, DataError
from nfnets.data.sources.base import Source

Progress = Callable[[int], None]  # told how many records are done so far
SAMPLE = 200  # records whose sizes are looked at
ROWS, COLUMNS = 5, 8  # of the picture grid
_CELL = 160  # pixels a side of a picture in it
_COUNTED_BYTES = 1 << 30  # splits of more bytes are not read whole to count their labels
_CHUNK = 16  # records that one task of a thread reads


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
  """What a split holds. Heights, widths, bytes: int64, one for each sampled record that can be read.

  counts: int64 [classes], how many of `labels_read` records each class has; corrupt: what is wrong with sampled records.
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
    """For people, one fact a line."""
    out = [f"{self.name} {self.split}: {self.records:,} records, {len(self.class_names):,} classes"]
    if len(self.bytes):
      out.append(
        f"  {len(self.bytes):,} images looked at (min / median / max): height {_range(self.heights)}, "
        f"width {_range(self.widths)}, mean {self.bytes.mean():,.0f} bytes"
      )
    absent = int((self.counts == 0).sum())
    of = "all" if self.labels_read == self.records else f"{self.labels_read:,} evenly spaced"
    out.append(
      f"  images a class (min / median / max), {of} records: {_range(self.counts)}"
      + (f"; {absent:,} classes have none" if absent else "")
    )
    return out + [f"  corrupt: {line}" for line in self.corrupt]


@dataclasses.dataclass(frozen=True, slots=True)
class Checked:
  """What `verify` found in a split. corrupt: each with its address; bytes: of the images that could be read."""

  split: str
  records: int
  corrupt: tuple[str, ...]
  bytes: int


def known_splits(config: DataConfig) -> dict[str, int]:
  """Records of every split that the dataset's metadata list; of what TFDS has not prepared, none."""
  if config.name in ("digits", "synthetic", "folder"):
    return {}
  from nfnets.data.sources.tfds import open_builder

  splits = open_builder(config)[0].info.splits
  return {name: info.num_examples for name, info in splits.items()}


def summarize(source: Source) -> Summary:
  """Sizes of up to 200 evenly spaced images; labels of all records, or of these where the split is large or remote."""
  sample = _evenly(len(source), SAMPLE)
  if source.remote:
    source.prefetch(np.asarray(sample))
  counts, corrupt, looked = np.zeros(source.num_classes, np.int64), [], []
  with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
    for seen in pool.map(lambda index: _look(source, index), sample):
      if isinstance(seen, str):
        corrupt.append(seen)
      else:
        looked.append(seen[:3])
        counts[seen[3]] += 1
    heights, widths, sizes = np.asarray(looked, np.int64).reshape(-1, 3).T
    read = len(looked)
    if not source.remote and len(sample) < len(source) and sizes.sum() / max(1, read) * len(source) <= _COUNTED_BYTES:
      labels = [label for label in pool.map(lambda index: _label(source, index), range(len(source))) if label is not None]
      counts, read = np.bincount(np.asarray(labels, np.int64), minlength=source.num_classes), len(source)
  return Summary(
    name=source.name,
    split=source.split,
    records=len(source),
    class_names=source.class_names,
    heights=heights,
    widths=widths,
    bytes=sizes,
    counts=counts,
    labels_read=read,
    corrupt=tuple(corrupt),
  )


def verify(
  source: Source,
  *,
  threads: int | None = None,
  progress: Progress = lambda done: None,
  found: Callable[[str], None] = lambda line: None,
) -> Checked:
  """Reads every record, checks its checksums and decodes its image; `found` is told of each that is corrupt, at once."""

  def check(start: int) -> tuple[list[str], int]:
    bad, size = [], 0
    for index in range(start, min(start + _CHUNK, len(source))):
      try:
        record = source[index]
        source.pixels(index, record)
        size += _size(record.image)
      except DataError as error:
        bad.append(str(error))
    return bad, size

  corrupt, total = [], 0
  pool = concurrent.futures.ThreadPoolExecutor(threads or (32 if source.remote else cores()))
  try:
    jobs = [pool.submit(check, start) for start in range(0, len(source), _CHUNK)]
    for done, job in enumerate(jobs, 1):
      bad, size = job.result()
      for line in bad:
        found(line)
      corrupt += bad
      total += size
      progress(min(done * _CHUNK, len(source)))
  finally:
    pool.shutdown(cancel_futures=True)
  return Checked(split=source.split, records=len(source), corrupt=tuple(corrupt), bytes=total)


# ---- pictures


def stored_pictures(source: Source) -> list[tuple[np.ndarray, str]]:
  """(uint8 [H, W, 3], class name) of evenly spaced records, as stored; corrupt ones are left out."""
  found = []
  for index in _evenly(len(source), ROWS * COLUMNS):
    try:
      record = source[index]
      image = source.pixels(index, record)
    except CorruptRecord:
      continue
    found.append((image, source.class_names[record.label]))
  return found


def training_pictures(
  source: Source, config: DataConfig, *, seed: int, say: Callable[[str], None] = print
) -> list[tuple[np.ndarray, str]]:
  """(uint8 [S, S, 3], class names and shares) of the first batch that training would see. config: with sizes filled in."""
  if config.image_size is None and config.train_crop != "none":
    config = dataclasses.replace(config, image_size=224)
  even = math.lcm(2, config.repeats)
  batch = -(-ROWS * COLUMNS // even) * even
  batches = TrainBatches(source, config, batch=batch, seed=seed, say=say)
  try:
    made = batches[0]
  finally:
    batches.close()
  names, pictures = source.class_names, []
  for i, (image, label) in enumerate(zip(made["image"], made["label"], strict=True)):
    text = names[label]
    if "ratio" in made and made["ratio"][i] < 1:
      ratio = float(made["ratio"][i])
      text = f"{ratio:.0%} {_short(text, 16)}\n{1 - ratio:.0%} {_short(names[made['mix_label'][i]], 16)}"
    pictures.append((image, text))
  return pictures[: ROWS * COLUMNS]


def draw(path: str, grids: Sequence[tuple[str, Sequence[tuple[np.ndarray, str]]]]) -> None:
  """Writes a PNG of grids of pictures, one below the other; each has a title, each picture its text.

  Raises DataError when the file cannot be written.
  """
  from matplotlib.figure import Figure

  rows = [-(-len(pictures) // COLUMNS) for _, pictures in grids]
  wide, tall, head, size = 1.7, 2.05, 0.5, 1.6  # inches: of a cell, of a title above a grid, of a picture
  width, height = wide * COLUMNS, sum(tall * count + head for count in rows)
  figure, top = Figure(figsize=(width, height), dpi=100), height
  for count, (title, pictures) in zip(rows, grids, strict=True):
    figure.text(0.5, (top - head * 0.6) / height, title, ha="center", fontsize=11, parse_math=False)
    top -= head
    for i, (image, text) in enumerate(pictures):
      left, bottom = wide * (i % COLUMNS) + (wide - size) / 2, top - tall * (i // COLUMNS + 1) + 0.05
      axes = figure.add_axes((left / width, bottom / height, size / width, size / height))
      axes.set_axis_off()
      axes.imshow(_fitted(image), interpolation="nearest")
      axes.set_title("\n".join(_short(line, 22) for line in text.split("\n")), fontsize=8, parse_math=False)
    top -= tall * count
  try:
    figure.savefig(path, format="png")
  except OSError as error:
    raise DataError(f"the picture {path} cannot be written: {error.strerror or error}") from error


def _fitted(image: np.ndarray) -> np.ndarray:
  """The central square, resized to a cell of the grid."""
  side = min(image.shape[:2])
  top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
  kind = cv2.INTER_AREA if side > _CELL else cv2.INTER_NEAREST
  return cv2.resize(np.ascontiguousarray(image[top : top + side, left : left + side]), (_CELL, _CELL), interpolation=kind)


def _short(text: str, most: int) -> str:
  return text if len(text) <= most else text[: most - 1] + "…"


# ---- records


def _evenly(count: int, most: int) -> list[int]:
  return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def _look(source: Source, index: int) -> tuple[int, int, int, int] | str:
  """(height, width, bytes, label) of a record, or what is wrong with it."""
  try:
    record = source[index]
    image = source.pixels(index, record)
  except DataError as error:
    return str(error)
  return *image.shape[:2], _size(record.image), record.label


def _label(source: Source, index: int) -> int | None:
  try:
    return source[index].label
  except DataError:
    return None


def _size(image: bytes | np.ndarray) -> int:
  return len(image) if isinstance(image, bytes) else image.nbytes


def _range(values: np.ndarray) -> str:
  return f"{values.min():,} / {np.median(values):,.0f} / {values.max():,}"
