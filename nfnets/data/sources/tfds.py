"""Opens datasets that TFDS has prepared, by name, with their splits, features and shards. TensorFlow is not needed for it."""

import concurrent.futures
import difflib
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from nfnets.config import DataConfig
from nfnets.data.errors import DataError, NoSuchSplit, reason
from nfnets.data.sources.base import ArraySource, Source
from nfnets.data.sources.examples import ArrayRecordSource, Piece, TFRecordSource
from nfnets.data.sources.metadata import INFO, LARGEST, Metadata, class_names, read_metadata
from nfnets.data.storage import buckets, remote, tfrecord
from nfnets.data.storage.index import default_cache_dir, load_index

Value = TypeVar("Value")


def open_tfds(config: DataConfig, split: str, progress: Callable[[str], None]) -> Source:
  """Opens a split of a prepared dataset. Nothing is downloaded: without a network TFDS would retry for minutes."""
  in_bucket = remote.is_url(config.dir)
  metadata = open_metadata(config)
  directory, kind = metadata.directory, metadata.file_format
  names = class_names(config, metadata)
  try:
    instructions = [part for part in metadata.splits[split].file_instructions if part.take > 0]
  except (ValueError, KeyError, NotImplementedError) as error:
    raise _no_such_split(config, split, metadata, error) from error
  pieces = [Piece(_shard_of(part, metadata), part.skip, part.take, part.examples_in_shard) for part in instructions]
  if not pieces:
    return ArraySource(config.name, split, names, np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0, np.int32))
  if kind == "tfrecord":
    return _open_tfrecord(config, split, names, pieces, in_bucket, progress)
  if kind != "array_record":
    raise DataError(f"{directory} is stored as {kind}, not as tfrecord or array_record; {_how_to_prepare(config)}")
  if in_bucket:
    raise DataError(f"{directory} is stored as array_record, which is read from disks only; in buckets use tfrecord, or copy it")
  return _open_array_record(config, split, names, pieces, instructions)


def open_metadata(config: DataConfig) -> Metadata:
  """Reads the splits and features of a prepared dataset, on a disk or in a bucket. Raises DataError."""
  os.environ.setdefault("NO_GCE_CHECK", "true")
  logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS recommends OpenCV at every start
  if not remote.is_url(config.dir):
    directory = _local_directory(config)
    return _read_metadata(config, directory, lambda: read_metadata(config, directory, directory))
  url = remote.find_version(config.dir, config.name)
  copy = remote.copy_metadata(url, LARGEST)
  try:
    return _read_metadata(config, url, lambda: read_metadata(config, copy, url))
  finally:
    shutil.rmtree(copy)


def _shard_of(part: Any, metadata: Metadata) -> str:
  """Returns the path or URL of the shard that a FileInstruction of TFDS names, which lies beside the metadata."""
  directory, name = os.path.split(str(part.filename))
  if directory != str(metadata.copy):
    raise DataError(f"{metadata.directory}/{INFO} names the shard {part.filename}, which is not in that directory")
  return f"{metadata.directory}/{name}"


def _no_such_split(config: DataConfig, split: str, metadata: Metadata, error: Exception) -> NoSuchSplit:
  """Returns the error for a split expression; TFDS's own words are added where the split itself exists."""
  known = ", ".join(f"{name} ({info.num_examples:,})" for name, info in metadata.splits.items())
  why = "" if not known or reason(error).startswith("Unknown split") else f" ({reason(error)})"
  return NoSuchSplit(f"{config.name} in {metadata.directory} has no split {split!r}{why}; it has: {known or 'none at all'}")


def _open_tfrecord(
  config: DataConfig,
  split: str,
  class_names: Sequence[str],
  pieces: list[Piece],
  in_bucket: bool,
  progress: Callable[[str], None],
) -> Source:
  files = {piece.file: piece.count for piece in pieces}  # a sum of slices can name a file twice
  index = load_index([*files], cache_dir=config.index_dir or default_cache_dir(), progress=progress)
  counts = index.counts()
  for (file, expected), count in zip(files.items(), counts, strict=True):
    _check_count(file, int(count), expected)
  starts = dict(zip(files, np.cumsum(counts) - counts, strict=True))
  rows = np.concatenate([starts[piece.file] + np.arange(piece.first, piece.first + piece.taken) for piece in pieces])
  reader = buckets.BucketReader(index.files) if in_bucket else tfrecord.FileReader(index.files)
  keys = config.image_key, config.label_key
  return TFRecordSource(config.name, split, class_names, keys, index=index, rows=rows, reader=reader, remote=in_bucket)


def _open_array_record(
  config: DataConfig, split: str, class_names: Sequence[str], pieces: list[Piece], instructions: list
) -> Source:
  from array_record.python import array_record_data_source, array_record_module

  def check(file: str, expected: int) -> None:
    if not tfrecord.check_readable(file).st_size:
      raise DataError(f"shard {file} is empty (0 bytes); {_how_to_prepare(config)}")
    try:
      reader = array_record_module.ArrayRecordReader(file)
      count = reader.num_records()
      reader.close()
    except Exception as error:  # array_record documents no error of its own
      raise DataError(f"shard {file} is truncated, or no array_record file: {reason(error)}") from error
    _check_count(file, count, expected)

  files = {piece.file: piece.count for piece in pieces}
  with concurrent.futures.ThreadPoolExecutor(min(16, len(files))) as pool:
    list(pool.map(check, files, files.values()))
  source = array_record_data_source.ArrayRecordDataSource(instructions)
  return ArrayRecordSource(config.name, split, class_names, (config.image_key, config.label_key), source=source, pieces=pieces)


def _check_count(file: str, count: int, expected: int) -> None:
  """Raises DataError when a shard holds another number of records than the metadata say."""
  if count != expected:
    raise DataError(
      f"shard {file} holds {count:,} records, but dataset_info.json says {expected:,}: it is cut short, or of "
      "another version; prepare the dataset again, or copy this shard again"
    )


def _local_directory(config: DataConfig) -> str:
  """Returns the version's directory of a dataset on a disk; the error of a missing one tells the nearest names."""
  from tensorflow_datasets.core import read_only_builder
  from tensorflow_datasets.core.utils import error_utils

  directory = os.path.abspath(os.path.expanduser(config.dir)) if config.dir else None
  if directory and not os.path.isdir(directory):
    raise DataError(f"config.data.dir={config.dir!r} is not a directory; {_how_to_prepare(config)}")
  if directory and not os.access(directory, os.R_OK | os.X_OK):
    raise DataError(f"config.data.dir={config.dir!r} cannot be read: Permission denied")
  place = directory or os.path.join("~", "tensorflow_datasets")
  with error_utils.record_error_context():  # which TFDS adds hints to, and fails without
    found = _read_metadata(config, place, lambda: read_only_builder._find_builder_dir(config.name, data_dir=directory))
  if found is None:
    raise _not_prepared(config, directory, place)
  return str(found)


def _not_prepared(config: DataConfig, directory: str | None, place: str) -> DataError:
  """Returns the error for a dataset that is not there; `place` is `directory`, or where TFDS looks without one."""
  import tensorflow_datasets as tfds

  prepared = [entry.name for entry in os.scandir(directory) if entry.is_dir()] if directory else []
  datasets = {*tfds.list_builders(with_community_datasets=False), *prepared}
  if config.name.partition(":")[0].partition("/")[0] in datasets:
    return DataError(
      f"{config.name} is not prepared under {place}; set config.data.dir to where it is, or {_how_to_prepare(config)}"
    )
  similar = difflib.get_close_matches(config.name, {*datasets, "digits", "folder", "synthetic"}, n=4, cutoff=0.5)
  return DataError(f"unknown dataset config.data.name={config.name!r}; near: {', '.join(similar) or 'none'}")


def _read_metadata(config: DataConfig, place: str, read: Callable[[], Value]) -> Value:
  """Returns what `read` makes of the files under `place`; raises DataError when they cannot be read."""
  try:
    return read()
  except DataError:
    raise
  except Exception as error:  # the parsers raise errors of many kinds for damaged files
    raise DataError(
      f"the metadata of {config.name} under {place} cannot be read ({type(error).__name__}: "
      f"{reason(error) if str(error) else ''}); {_how_to_prepare(config)}"
    ) from error


def _how_to_prepare(config: DataConfig) -> str:
  """Returns the command that prepares the dataset, for the end of a message."""
  name = config.name.partition(":")[0]
  directory = f" --data_dir={config.dir}" if config.dir else ""
  manual = " (its archives must be downloaded by hand first: see its page in the TFDS catalog)" if "imagenet2012" in name else ""
  return f"prepare it once, where tensorflow is installed: tfds build {name}{directory}{manual}"
