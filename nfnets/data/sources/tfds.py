"""Datasets that TFDS has prepared, found by name: their splits, features and shards. TensorFlow is not needed to read them."""

import concurrent.futures
import difflib
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nfnets.config import DataConfig
from nfnets.data.errors import DataError, NoSuchSplit, reason
from nfnets.data.sources.base import ArraySource, Source
from nfnets.data.sources.examples import ArrayRecordSource, TFRecordSource
from nfnets.data.storage import buckets, remote, tfrecord
from nfnets.data.storage.index import default_cache_dir, load_index


def open_tfds(config: DataConfig, split: str, progress: Callable[[str], None]) -> Source:
  """A dataset as TFDS has prepared it. Nothing is downloaded: without a network TFDS would retry for minutes."""
  in_bucket = remote.is_url(config.dir)
  builder, where = open_builder(config)
  class_names = _class_names(config, builder.info.features)
  try:
    instructions = [one for one in builder.info.splits[split].file_instructions if one.take > 0]
  except (ValueError, KeyError, NotImplementedError) as error:
    raise NoSuchSplit(
      f"{config.name} has no split {split!r} ({reason(error)}); it has: "
      f"{', '.join(f'{name} ({info.num_examples:,})' for name, info in builder.info.splits.items())}"
    ) from error
  here = str(builder.data_path)
  pieces = [(where + str(one.filename).removeprefix(here), one.skip, one.take, one.examples_in_shard) for one in instructions]
  kind = builder.info.file_format.value if builder.info.file_format else None
  common = (config.name, split, class_names, (config.image_key, config.label_key))
  if not pieces:
    return ArraySource(config.name, split, class_names, np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0, np.int32))
  if kind == "tfrecord":
    return _tfrecord(config, common, pieces, in_bucket, progress)
  if kind != "array_record":
    raise DataError(f"{where} is stored as {kind}, not as tfrecord or array_record; {_how_to_prepare(config)}")
  if in_bucket:
    raise DataError(f"{where} is stored as array_record, which is read from disks only; in buckets use tfrecord, or copy it")
  return _array_record(config, common, pieces, instructions)


def open_builder(config: DataConfig) -> tuple[Any, str]:
  """(TFDS's builder, with its splits and features, and the directory or URL of the version). Raises DataError."""
  os.environ.setdefault("NO_GCE_CHECK", "true")
  logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS recommends OpenCV at every start
  import tensorflow_datasets as tfds

  if not remote.is_url(config.dir):
    builder = _local_builder(config)
    return builder, str(builder.data_path)
  where = remote.find_version(config.dir, config.name)
  metadata = remote.copy_metadata(where)
  try:
    return _opened(config, where, lambda: tfds.builder_from_directory(metadata)), where
  finally:
    shutil.rmtree(metadata)


def _tfrecord(config: DataConfig, common: tuple, pieces: list[tuple], in_bucket: bool, progress: Callable[[str], None]) -> Source:
  files = {file: count for file, _, _, count in pieces}  # a sum of slices can name a file twice
  index = load_index([*files], cache_dir=config.index_dir or default_cache_dir(), progress=progress)
  counts = index.counts()
  for (file, expected), count in zip(files.items(), counts, strict=True):
    _check_count(file, int(count), expected)
  starts = dict(zip(files, np.cumsum(counts) - counts, strict=True))
  rows = np.concatenate([starts[file] + np.arange(skip, skip + take) for file, skip, take, _ in pieces])
  if in_bucket:
    reader = buckets.BucketReader(index.files)
  else:
    reader = tfrecord.FileReader(index.files)
  return TFRecordSource(*common, index=index, rows=rows, reader=reader, remote=in_bucket)


def _array_record(config: DataConfig, common: tuple, pieces: list[tuple], instructions: list) -> Source:
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

  files = {file: count for file, _, _, count in pieces}
  with concurrent.futures.ThreadPoolExecutor(min(16, len(files))) as pool:
    list(pool.map(check, files, files.values()))
  return ArrayRecordSource(*common, source=array_record_data_source.ArrayRecordDataSource(instructions), pieces=pieces)


def _check_count(file: str, count: int, expected: int) -> None:
  if count != expected:
    raise DataError(
      f"shard {file} holds {count:,} records, but dataset_info.json says {expected:,}: it is cut short, or of "
      "another version; prepare the dataset again, or copy this shard again"
    )


def _local_builder(config: DataConfig) -> Any:
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.read_only_builder import builder_from_files

  directory = os.path.abspath(os.path.expanduser(config.dir)) if config.dir else None
  if directory and not os.path.isdir(directory):
    raise DataError(f"config.data.dir={config.dir!r} is not a directory; {_how_to_prepare(config)}")
  if directory and not os.access(directory, os.R_OK | os.X_OK):
    raise DataError(f"config.data.dir={config.dir!r} cannot be read: Permission denied")
  where = directory or os.path.join("~", "tensorflow_datasets")
  try:
    return _opened(config, where, lambda: builder_from_files(config.name, data_dir=directory))
  except tfds.core.registered.DatasetNotFoundError as error:
    here = [entry.name for entry in os.scandir(directory) if entry.is_dir()] if directory else []
    known = {*tfds.list_builders(with_community_datasets=False), *here}
    if config.name.partition(":")[0].partition("/")[0] in known:
      raise DataError(
        f"{config.name} is not prepared under {where}; set config.data.dir to where it is, or {_how_to_prepare(config)}"
      ) from error
    near = difflib.get_close_matches(config.name, {*known, "digits", "folder", "synthetic"}, n=4, cutoff=0.5)
    raise DataError(f"unknown dataset config.data.name={config.name!r}; near: {', '.join(near) or 'none'}") from error


def _opened(config: DataConfig, where: str, make: Callable[[], Any]) -> Any:
  import tensorflow_datasets as tfds

  try:
    return make()
  except tfds.core.registered.DatasetNotFoundError:
    raise
  except Exception as error:  # files that TFDS cannot make sense of raise whatever its parsers do
    raise DataError(
      f"the metadata of {config.name} under {where} cannot be read ({type(error).__name__}: "
      f"{reason(error) if str(error) else ''}); {_how_to_prepare(config)}"
    ) from error


def _class_names(config: DataConfig, features: Any) -> Sequence[str]:
  import tensorflow_datasets as tfds

  kinds = {key: type(feature).__name__ for key, feature in features.items()} if hasattr(features, "items") else {}
  there = ", ".join(f"{key} ({kind})" for key, kind in sorted(kinds.items())) or "none by name"
  for field, kind in (("image_key", tfds.features.Image), ("label_key", tfds.features.ClassLabel)):
    key = getattr(config, field)
    if key not in kinds or not isinstance(features[key], kind):
      raise DataError(f"config.data.{field}={key!r} is no {kind.__name__} feature of {config.name}; it has: {there}")
  if np.dtype(features[config.image_key].np_dtype).kind != "u":
    raise DataError(f"the images of {config.name} are {features[config.image_key].np_dtype}, not encoded as uint8 or uint16")
  return features[config.label_key].names


def _how_to_prepare(config: DataConfig) -> str:
  name = config.name.partition(":")[0]
  directory = f" --data_dir={config.dir}" if config.dir else ""
  manual = " (its archives must be downloaded by hand first: see its page in the TFDS catalog)" if "imagenet2012" in name else ""
  return f"prepare it once, where tensorflow is installed: tfds build {name}{directory}{manual}"
