"""Opens datasets that TFDS has prepared, by name, with their splits, features and shards. TensorFlow is not needed for it."""

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
from nfnets.data.sources.examples import ArrayRecordSource, Piece, TFRecordSource
from nfnets.data.storage import buckets, remote, tfrecord
from nfnets.data.storage.index import default_cache_dir, load_index


def open_tfds(config: DataConfig, split: str, progress: Callable[[str], None]) -> Source:
  """Opens a split of a prepared dataset. Nothing is downloaded: without a network TFDS would retry for minutes."""
  in_bucket = remote.is_url(config.dir)
  builder, directory = open_builder(config)
  class_names = _class_names(config, builder.info.features)
  try:
    instructions = [part for part in builder.info.splits[split].file_instructions if part.take > 0]
  except (ValueError, KeyError, NotImplementedError) as error:
    raise NoSuchSplit(
      f"{config.name} has no split {split!r} ({reason(error)}); it has: "
      f"{', '.join(f'{name} ({info.num_examples:,})' for name, info in builder.info.splits.items())}"
    ) from error
  # The builder of a bucket knows the local copy of the metadata, not the directory of the shards.
  file_of = lambda part: directory + str(part.filename).removeprefix(str(builder.data_path))
  pieces = [Piece(file_of(part), part.skip, part.take, part.examples_in_shard) for part in instructions]
  kind = builder.info.file_format.value if builder.info.file_format else None
  if not pieces:
    return ArraySource(config.name, split, class_names, np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0, np.int32))
  if kind == "tfrecord":
    return _open_tfrecord(config, split, class_names, pieces, in_bucket, progress)
  if kind != "array_record":
    raise DataError(f"{directory} is stored as {kind}, not as tfrecord or array_record; {_how_to_prepare(config)}")
  if in_bucket:
    raise DataError(f"{directory} is stored as array_record, which is read from disks only; in buckets use tfrecord, or copy it")
  return _open_array_record(config, split, class_names, pieces, instructions)


def open_builder(config: DataConfig) -> tuple[Any, str]:
  """Returns (TFDS's builder, which has splits and features, and the version's directory or URL). Raises DataError."""
  os.environ.setdefault("NO_GCE_CHECK", "true")
  logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS recommends OpenCV at every start
  import tensorflow_datasets as tfds

  if not remote.is_url(config.dir):
    builder = _local_builder(config)
    return builder, str(builder.data_path)
  url = remote.find_version(config.dir, config.name)
  metadata = remote.copy_metadata(url)
  try:
    return _read_metadata(config, url, lambda: tfds.builder_from_directory(metadata)), url
  finally:
    shutil.rmtree(metadata)


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


def _local_builder(config: DataConfig) -> Any:
  """Returns TFDS's builder of a dataset on a disk; the error of a missing one tells the nearest names."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.read_only_builder import builder_from_files

  directory = os.path.abspath(os.path.expanduser(config.dir)) if config.dir else None
  if directory and not os.path.isdir(directory):
    raise DataError(f"config.data.dir={config.dir!r} is not a directory; {_how_to_prepare(config)}")
  if directory and not os.access(directory, os.R_OK | os.X_OK):
    raise DataError(f"config.data.dir={config.dir!r} cannot be read: Permission denied")
  place = directory or os.path.join("~", "tensorflow_datasets")
  try:
    return _read_metadata(config, place, lambda: builder_from_files(config.name, data_dir=directory))
  except tfds.core.registered.DatasetNotFoundError as error:
    prepared = [entry.name for entry in os.scandir(directory) if entry.is_dir()] if directory else []
    datasets = {*tfds.list_builders(with_community_datasets=False), *prepared}
    if config.name.partition(":")[0].partition("/")[0] in datasets:
      raise DataError(
        f"{config.name} is not prepared under {place}; set config.data.dir to where it is, or {_how_to_prepare(config)}"
      ) from error
    similar = difflib.get_close_matches(config.name, {*datasets, "digits", "folder", "synthetic"}, n=4, cutoff=0.5)
    raise DataError(f"unknown dataset config.data.name={config.name!r}; near: {', '.join(similar) or 'none'}") from error


def _read_metadata(config: DataConfig, place: str, make: Callable[[], Any]) -> Any:
  """Returns the builder that `make` makes of the files under `place`; raises DataError when they cannot be read."""
  import tensorflow_datasets as tfds

  try:
    return make()
  except tfds.core.registered.DatasetNotFoundError:
    raise
  except Exception as error:  # TFDS's parsers raise errors of many kinds for damaged files
    raise DataError(
      f"the metadata of {config.name} under {place} cannot be read ({type(error).__name__}: "
      f"{reason(error) if str(error) else ''}); {_how_to_prepare(config)}"
    ) from error


def _class_names(config: DataConfig, features: Any) -> Sequence[str]:
  """Returns the names of the classes; raises DataError when the dataset has no such image or label feature."""
  import tensorflow_datasets as tfds

  kinds = {key: type(feature).__name__ for key, feature in features.items()} if hasattr(features, "items") else {}
  available = ", ".join(f"{key} ({kind})" for key, kind in sorted(kinds.items())) or "none by name"
  for field, kind in (("image_key", tfds.features.Image), ("label_key", tfds.features.ClassLabel)):
    key = getattr(config, field)
    if key not in kinds or not isinstance(features[key], kind):
      raise DataError(f"config.data.{field}={key!r} is no {kind.__name__} feature of {config.name}; it has: {available}")
  if np.dtype(features[config.image_key].np_dtype).kind != "u":
    raise DataError(f"the images of {config.name} are {features[config.image_key].np_dtype}, not encoded as uint8 or uint16")
  return features[config.label_key].names


def _how_to_prepare(config: DataConfig) -> str:
  """Returns the command that prepares the dataset, for the end of a message."""
  name = config.name.partition(":")[0]
  directory = f" --data_dir={config.dir}" if config.dir else ""
  manual = " (its archives must be downloaded by hand first: see its page in the TFDS catalog)" if "imagenet2012" in name else ""
  return f"prepare it once, where tensorflow is installed: tfds build {name}{directory}{manual}"
