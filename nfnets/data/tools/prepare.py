"""Writes a dataset once with smaller images, as TFRecord shards that TFDS reads: for hosts with few cores or little disk.

DIR/NAME/VERSION holds features.json, dataset_info.json, the class names and NAME-SPLIT.tfrecord-00000-of-0000N. A shard
appears whole or not at all, so that a run after an interruption writes only the missing ones; prepared.json has the
settings that they were made with.
"""

import collections
import concurrent.futures
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg

from nfnets.config import DataConfig
from nfnets.data.batches.prefetch import cores
from nfnets.data.errors import CorruptRecord, DataError
from nfnets.data.images import decode
from nfnets.data.sources.base import Source
from nfnets.data.sources.open import open_source
from nfnets.data.storage import remote, tfrecord
from nfnets.data.storage.example import serialize_example
from nfnets.files import remove_unfinished, whole_file, write_file

VERSION = "1.0.0"
SETTINGS = "prepared.json"
PER_SHARD = 2048  # records, where the number of shards is not given
LONGEST_JPEG = 65_500  # pixels of a side that libjpeg writes
_AHEAD = 8  # records for each thread that are encoded before they are written


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
  """What was written to the version directory `path`.

  records: their number in each split; kept: how many of the shards are from an earlier run; lost: how many records were
  left out as corrupt; bytes: of all shards.
  """

  name: str
  path: str
  records: dict[str, int]
  shards: int
  kept: int
  lost: int
  bytes: int


class _Shard(NamedTuple):
  """Shard `number` of `count` of a split: the source's records [start, stop)."""

  split: str
  number: int
  count: int
  start: int
  stop: int


class Preparation:
  """A dataset to be written, with the sources of its splits open; `close` it at the end.

  The splits that the split expressions of `config` name are written as a whole, in the order that the source takes slices
  from (a folder's is seen in the sum of two), so that the same expressions mean the same images.

  Args:
    config: the dataset that is read.
    directory: where the new dataset is written, on a disk.
    short_side: pixels of the shorter side of larger images.
    quality: of the JPEGs, 1 to 100.
    shards: of the first split; None makes shards of 2,048 records.
    say: called with a line about every corrupt record.

  Raises:
    DataError: the source cannot be opened, or `directory` cannot be written or holds something else.
  """

  def __init__(
    self,
    config: DataConfig,
    directory: str,
    *,
    short_side: int = 256,
    quality: int = 90,
    shards: int | None = None,
    say: Callable[[str], None] = lambda line: None,
  ):
    if remote.is_url(directory):
      raise DataError(f"{directory} is no directory: prepared shards are written to disks; copy them to the bucket afterwards")
    self._config, self._short_side, self._quality, self._say = config, short_side, quality, say
    self.name = prepared_name(config.name)
    self.path = os.path.join(os.path.abspath(os.path.expanduser(directory)), self.name, VERSION)
    self._sources: dict[str, Source] = {}
    try:
      for split in named_splits(config):
        expression = f"{split}[:50%]+{split}[50%:]" if config.name == "folder" else split
        self._sources[split] = open_source(config, expression, progress=say)
      self._shards = self._divide(shards)
      self.total = sum(map(len, self._sources.values()))
      self._claim()
    except BaseException:
      self.close()
      raise
    self.done = sum(shard.stop - shard.start for shard in self._shards if os.path.exists(self._path_of(shard)))

  def close(self) -> None:
    """Closes the sources."""
    for source in self._sources.values():
      source.close()

  def run(self, progress: Callable[[int], None] = lambda done: None) -> Prepared:
    """Writes the shards that are missing, then the metadata.

    Args:
      progress: called with the number of records that are done, of `total`.

    Raises:
      DataError: more records are corrupt than config.max_corrupt allows, or a file cannot be written.
    """
    missing = [shard for shard in self._shards if not os.path.exists(self._path_of(shard))]
    try:
      remove_unfinished(self.path)
      self._write_shards(missing, progress)
      sizes = self._measure_shards()
      self._write_metadata(sizes)
    except OSError as error:
      raise DataError(f"{self.path} cannot be written: {error.strerror or error}") from error
    written = {split: sum(records for records, _ in of_split) for split, of_split in sizes.items()}
    return Prepared(
      name=self.name,
      path=self.path,
      records=written,
      shards=len(self._shards),
      kept=len(self._shards) - len(missing),
      lost=self.total - sum(written.values()),
      bytes=sum(size for of_split in sizes.values() for _, size in of_split),
    )

  def _divide(self, shards: int | None) -> list[_Shard]:
    """Divides the splits into shards of about equal size. shards: how many the first split has."""
    first = len(next(iter(self._sources.values())))
    largest = max(map(len, self._sources.values()))
    per_shard = -(-first // min(shards, first)) if shards else min(PER_SHARD, largest)
    return [
      _Shard(split, number, count, len(source) * number // count, len(source) * (number + 1) // count)
      for split, source in self._sources.items()
      for count in [max(1, round(len(source) / per_shard))]
      for number in range(count)
    ]

  def _write_shards(self, shards: list[_Shard], progress: Callable[[int], None]) -> None:
    done, lost = self.done, 0
    self._prefetch(shards[:1])
    records = [(shard.split, index) for shard in shards for index in range(shard.start, shard.stop)]
    with _OrderedResults(self._encode, records) as results:
      for position, shard in enumerate(shards):
        self._prefetch(shards[position + 1 : position + 2])
        with whole_file(self._path_of(shard)) as stream:
          for payload in results.take(shard.stop - shard.start):
            if isinstance(payload, CorruptRecord):
              lost += 1
              self._say(f"corrupt record, left out: {payload}")
              if lost > self._config.max_corrupt * self.total:
                raise DataError(
                  f"{lost} of {self.total:,} records are corrupt, more than config.data.max_corrupt="
                  f"{self._config.max_corrupt:g} allows; the last: {payload}"
                )
            else:
              stream.write(tfrecord.frame(payload))
            done += 1
            progress(done)

  def _settings(self) -> dict[str, Any]:
    """Returns what the shards depend on, for prepared.json."""
    directory = self._config.dir
    if directory and not remote.is_url(directory):
      directory = os.path.abspath(os.path.expanduser(directory))
    return {
      "source": "folder, classes mixed" if self._config.name == "folder" else self._config.name,
      "dir": directory,
      "image_key": self._config.image_key,
      "label_key": self._config.label_key,
      "short_side": self._short_side,
      "quality": self._quality,
      "records": {split: len(source) for split, source in self._sources.items()},
      "shards": dict(collections.Counter(shard.split for shard in self._shards)),
    }

  def _claim(self) -> None:
    """Writes the settings to the directory; raises DataError if it holds a dataset with other settings or anything else."""
    settings, path = self._settings(), os.path.join(self.path, SETTINGS)
    try:
      with open(path, encoding="utf-8") as stream:
        earlier = json.load(stream)
      differences = [f"{key}={earlier.get(key)}, now {settings[key]}" for key in settings if earlier.get(key) != settings[key]]
      if differences:
        raise DataError(
          f"{self.path} was made with {'; '.join(differences)}: set these as they were, or another --out, or delete it"
        )
    except (FileNotFoundError, NotADirectoryError):
      if os.path.isdir(self.path) and os.listdir(self.path):
        raise DataError(
          f"{self.path} holds something that this program did not write (no {SETTINGS}); set another --out"
        ) from None
      try:
        os.makedirs(self.path, exist_ok=True)
        write_file(path, json.dumps(settings, indent=2).encode())
      except OSError as error:
        raise DataError(f"{self.path} cannot be written: {error.strerror}") from error
    except (OSError, json.JSONDecodeError, AttributeError) as error:
      raise DataError(
        f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is damaged'}; delete {self.path}, or set another --out"
      ) from error

  def _path_of(self, shard: _Shard) -> str:
    return os.path.join(self.path, f"{self.name}-{shard.split}.tfrecord-{shard.number:05d}-of-{shard.count:05d}")

  def _prefetch(self, shards: list[_Shard]) -> None:
    for shard in shards:
      source = self._sources[shard.split]
      if source.remote:
        source.prefetch(np.arange(shard.start, shard.stop))

  def _encode(self, key: tuple[str, int]) -> bytes | CorruptRecord:
    """Returns the tf.Example of record (split, index) with its smaller image, or what is wrong with the record."""
    split, index = key
    source = self._sources[split]
    try:
      record = source[index]
      pixels = source.pixels(index, record)
      # The new dataset is read without regard to EXIF, so that bytes which need turning are not kept.
      keep = not isinstance(record.image, bytes) or decode.orientation(record.image, source.rules) == 1
      image = smaller(record.image if keep else pixels, pixels, short_side=self._short_side, quality=self._quality)
    except CorruptRecord as error:
      return error
    return serialize_example({self._config.image_key: image, self._config.label_key: record.label})

  def _measure_shards(self) -> dict[str, list[tuple[int, int]]]:
    """Returns (records, bytes) of the shards of each split, read from the files."""
    sizes: dict[str, list[tuple[int, int]]] = {split: [] for split in self._sources}
    for shard in self._shards:
      with open(self._path_of(shard), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        read = lambda at, length, stream=stream: os.pread(stream.fileno(), length, at)
        sizes[shard.split].append((len(tfrecord.scan(stream.name, size, read)) if size else 0, size))
    return sizes

  def _write_metadata(self, sizes: dict[str, list[tuple[int, int]]]) -> None:
    """Writes TFDS's files. sizes: (records, bytes) of the shards of each split."""
    import tensorflow_datasets as tfds

    names = next(iter(self._sources.values())).class_names
    image, label = self._config.image_key, self._config.label_key
    # No encoding format is named: images that were small enough keep their bytes, in any format.
    tfds.features.FeaturesDict(
      {image: tfds.features.Image(shape=(None, None, 3)), label: tfds.features.ClassLabel(names=list(names))}
    ).save_config(self.path)
    splits = [
      {
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "name": split,
        "numBytes": str(sum(size for _, size in of_split)),
        "shardLengths": [str(records) for records, _ in of_split],
      }
      for split, of_split in sizes.items()
    ]
    info = {
      "name": self.name,
      "version": VERSION,
      "fileFormat": "tfrecord",
      "moduleName": __name__,
      "splits": splits,
      "description": f"{self._config.name}, shorter side at most {self._short_side} pixels, JPEG quality {self._quality}",
      "supervisedKeys": {"tuple": {"items": [{"featureKey": image}, {"featureKey": label}]}},
    }
    # This file is the last: without it TFDS sees no dataset.
    write_file(os.path.join(self.path, "dataset_info.json"), json.dumps(info, indent=2).encode())


def prepared_name(name: str) -> str:
  """Returns the new dataset's name: the source's without namespace, configuration and version, or with a suffix if built-in."""
  short = re.sub(r"\W", "_", re.sub(r":[\d.*]+$", "", name).rpartition(":")[2]).lower()
  return f"{short}_prepared" if short in ("digits", "synthetic", "folder") else short


def named_splits(config: DataConfig) -> list[str]:
  """Returns the splits that the two split expressions of a configuration name, e.g. train for "train[:98%]"."""
  terms = f"{config.train_split}+{config.test_split}".split("+")
  return list(dict.fromkeys(re.sub(r"\[.*", "", term).strip() for term in terms))


def smaller(image: bytes | np.ndarray, pixels: np.ndarray, *, short_side: int, quality: int) -> bytes:
  """Returns a JPEG whose shorter side has `short_side` pixels; smaller ones keep their bytes. What is stored as pixels,
  or is too long for a JPEG, becomes a PNG.

  Args:
    image: the bytes of an image, or its pixels where it is stored as such.
    pixels: its pixels, uint8 [height, width, 3].
    short_side: pixels.
    quality: of the JPEG, 1 to 100.
  """
  height, width = pixels.shape[:2]
  if min(height, width) <= short_side:
    return image if isinstance(image, bytes) else _png(pixels)
  scale = short_side / min(height, width)
  size = max(short_side, round(width * scale)), max(short_side, round(height * scale))
  pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
  if max(size) > LONGEST_JPEG:
    return _png(pixels)
  return simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420")


def _png(pixels: np.ndarray) -> bytes:
  return cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()


class _OrderedResults:
  """The results of `work(item)` in the order of the items, computed by threads that stay a few items ahead."""

  def __init__(self, work: Callable[[Any], Any], items: Sequence[Any]):
    cv2.setNumThreads(1)  # the pool's threads use all cores already
    threads = cores()
    self._work, self._items = work, iter(items)
    self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="prepare")
    self._pending: collections.deque = collections.deque()
    for _ in range(threads * _AHEAD):
      self._submit()

  def take(self, count: int) -> Iterator[Any]:
    """Yields the next `count` results; raises what `work` raised."""
    for _ in range(count):
      yield self._pending.popleft().result()
      self._submit()

  def _submit(self) -> None:
    """Hands the next item to the threads, if there is one."""
    for item in self._items:
      self._pending.append(self._pool.submit(self._work, item))
      return

  def __enter__(self) -> "_OrderedResults":
    return self

  def __exit__(self, *error) -> None:
    self._pool.shutdown(cancel_futures=True)
