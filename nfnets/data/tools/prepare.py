"""Writes a dataset's images smaller, once, as TFRecord shards that TFDS reads: for hosts with few cores or little disk.

DIR/NAME/VERSION holds features.json, dataset_info.json, the class names and NAME-SPLIT.tfrecord-00000-of-0000N. A shard appears
whole or not at all, so that an interrupted run goes on with the first one missing; prepared.json says what it was made of.
"""

import collections
import concurrent.futures
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator

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


_AHEAD = 8  # records that each thread may be ahead of the file


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
  """What was written. kept: shards that were there already; lost: records left out as corrupt; bytes: of the shards."""

  name: str
  path: str
  records: dict[str, int]
  shards: int
  kept: int
  lost: int
  bytes: int


class Preparation:
  """A dataset to be written, with the sources of its splits open; `close` them.

  Splits are whole ones: those that the split expressions of `config` name, in the order of the source, so that the same
  expressions mean the same images.

  Raises DataError when the source cannot be loaded, `directory` cannot be written, or what lies there is something else.
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
        self._sources[split] = open_source(config, split, progress=say)
      most = max(map(len, self._sources.values()))
      first = len(next(iter(self._sources.values())))
      per_shard = -(-first // min(shards, first)) if shards else min(PER_SHARD, most)
      # (split, number, of, first record, last record + 1)
      self._shards = [
        (split, i, count, len(source) * i // count, len(source) * (i + 1) // count)
        for split, source in self._sources.items()
        for count in [max(1, round(len(source) / per_shard))]
        for i in range(count)
      ]
      self.total = sum(map(len, self._sources.values()))
      self._claim()
    except BaseException:
      self.close()
      raise
    self.done = sum(stop - start for split, i, count, start, stop in self._shards if self._is_there(split, i, count))

  def close(self) -> None:
    for source in self._sources.values():
      source.close()

  def run(self, progress: Callable[[int], None] = lambda done: None) -> Prepared:
    """Writes the shards that are missing, then the metadata. progress: told how many records are done, of `total`.

    Raises DataError when more records are corrupt than config.max_corrupt allows, or a file cannot be written.
    """
    missing = [shard for shard in self._shards if not self._is_there(*shard[:3])]
    done, lost = self.done, 0
    self._prefetch(missing[:1])
    try:
      remove_unfinished(self.path)
      with _OrderedResults(self._encoded, [(shard[0], i) for shard in missing for i in range(*shard[3:])]) as results:
        for at, (split, number, count, start, stop) in enumerate(missing):
          self._prefetch(missing[at + 1 : at + 2])
          with whole_file(self._shard(split, number, count)) as stream:
            for payload in results.take(stop - start):
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
      lengths = self._write_metadata()
    except OSError as error:
      raise DataError(f"{self.path} cannot be written: {error.strerror or error}") from error
    written = {split: sum(count for count, _ in found) for split, found in lengths.items()}
    return Prepared(
      name=self.name,
      path=self.path,
      records=written,
      shards=len(self._shards),
      kept=len(self._shards) - len(missing),
      lost=self.total - sum(written.values()),
      bytes=sum(size for found in lengths.values() for _, size in found),
    )

  def _claim(self) -> None:
    """Makes the directory ours, or finds that it is already, with the same settings."""
    settings = {
      "source": self._config.name,
      "dir": os.path.abspath(os.path.expanduser(self._config.dir))
      if self._config.dir and not remote.is_url(self._config.dir)
      else self._config.dir,
      "image_key": self._config.image_key,
      "label_key": self._config.label_key,
      "short_side": self._short_side,
      "quality": self._quality,
      "records": {split: len(source) for split, source in self._sources.items()},
      "shards": dict(collections.Counter(shard[0] for shard in self._shards)),
    }
    path = os.path.join(self.path, SETTINGS)
    try:
      with open(path, encoding="utf-8") as stream:
        there = json.load(stream)
      other = [f"{key}={there.get(key)}, now {settings[key]}" for key in settings if there.get(key) != settings[key]]
      if other:
        raise DataError(f"{self.path} was made with {'; '.join(other)}: set these as they were, or another --out, or delete it")
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

  def _shard(self, split: str, number: int, count: int) -> str:
    return os.path.join(self.path, f"{self.name}-{split}.tfrecord-{number:05d}-of-{count:05d}")

  def _is_there(self, split: str, number: int, count: int) -> bool:
    return os.path.exists(self._shard(split, number, count))

  def _prefetch(self, shards: list[tuple]) -> None:
    for split, _, _, start, stop in shards:
      if self._sources[split].remote:
        self._sources[split].prefetch(np.arange(start, stop))

  def _encoded(self, where: tuple[str, int]) -> bytes | CorruptRecord:
    """The tf.Example of a record, or what is wrong with it."""
    source, index = self._sources[where[0]], where[1]
    try:
      record = source[index]
      try:
        image = smaller(record.image, short_side=self._short_side, quality=self._quality)
      except decode.UnreadableImage as error:
        raise CorruptRecord(source.address(index), str(error)) from error
    except CorruptRecord as error:
      return error
    return serialize_example({self._config.image_key: image, self._config.label_key: record.label})

  def _write_metadata(self) -> dict[str, list[tuple[int, int]]]:
    """(records, bytes) of every shard, as they lie there."""
    import tensorflow_datasets as tfds

    lengths: dict[str, list[tuple[int, int]]] = {split: [] for split in self._sources}
    for split, number, count, _, _ in self._shards:
      with open(self._shard(split, number, count), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        read = lambda at, length, stream=stream: os.pread(stream.fileno(), length, at)
        lengths[split].append((len(tfrecord.scan(stream.name, size, read)) if size else 0, size))
    names = next(iter(self._sources.values())).class_names
    image, label = self._config.image_key, self._config.label_key
    # no encoding format: images that were small enough keep their bytes, whatever they are
    tfds.features.FeaturesDict(
      {image: tfds.features.Image(shape=(None, None, 3)), label: tfds.features.ClassLabel(names=list(names))}
    ).save_config(self.path)
    splits = [
      {
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "name": split,
        "numBytes": str(sum(size for _, size in found)),
        "shardLengths": [str(count) for count, _ in found],
      }
      for split, found in lengths.items()
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
    # the last file: without it there is no dataset
    write_file(os.path.join(self.path, "dataset_info.json"), json.dumps(info, indent=2).encode())
    return lengths


def prepared_name(name: str) -> str:
  """The name of what is written: the source's, without namespace, configuration and version; built-in ones get a suffix."""
  short = re.sub(r"\W", "_", re.sub(r":[\d.*]+$", "", name).rpartition(":")[2]).lower()
  return f"{short}_prepared" if short in ("digits", "synthetic", "folder") else short


def named_splits(config: DataConfig) -> list[str]:
  """The splits that the two split expressions of a configuration are made of, e.g. of "train[:98%]" train."""
  terms = f"{config.train_split}+{config.test_split}".split("+")
  return list(dict.fromkeys(re.sub(r"\[.*", "", term).strip() for term in terms))


def smaller(image: bytes | np.ndarray, *, short_side: int, quality: int) -> bytes:
  """A JPEG whose shorter side has `short_side` pixels; what has no more keeps its bytes (pixels become a PNG).

  Raises decode.UnreadableImage.
  """
  pixels = decode.pixels(image) if isinstance(image, bytes) else image
  height, width = pixels.shape[:2]
  if min(height, width) <= short_side:
    return image if isinstance(image, bytes) else cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()
  scale = short_side / min(height, width)
  size = max(short_side, round(width * scale)), max(short_side, round(height * scale))
  pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
  return simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420")


class _OrderedResults:
  """What `work` makes of the items, in order, by a pool of threads that is never far ahead."""

  def __init__(self, work: Callable, items: list):
    cv2.setNumThreads(1)  # the threads are ours
    threads = cores()
    self._work, self._items = work, iter(items)
    self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="prepare")
    self._pending: collections.deque = collections.deque()
    for _ in range(threads * _AHEAD):
      self._submit()

  def take(self, count: int) -> Iterator:
    for _ in range(count):
      yield self._pending.popleft().result()
      self._submit()

  def _submit(self) -> None:
    for item in self._items:
      self._pending.append(self._pool.submit(self._work, item))
      return

  def __enter__(self) -> "_OrderedResults":
    return self

  def __exit__(self, *error) -> None:
    self._pool.shutdown(cancel_futures=True)
