"""Reads what TFDS wrote beside the shards of a dataset, without running what the files name.

TFDS itself imports the module of every class that features.json (or dataset_info.json) names: a dataset from elsewhere could
run any code. Here a feature is a name and a table of facts, and of dataset_info.json only splits and format are used.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nfnets.config import DataConfig
from nfnets.data.errors import DataError, reason
from nfnets.data.storage.regular import read_regular

FEATURES, INFO = "features.json", "dataset_info.json"
LARGEST = 1 << 26  # bytes of a file of metadata; ImageNet's have some kilobytes, and the names of 21,841 classes half a megabyte
MOST_CLASSES = 1_000_000
_TFDS = "tensorflow_datasets.core.features."
_DICT = f"{_TFDS}features_dict.FeaturesDict"
_KINDS = {
  "Image": (f"{_TFDS}image_feature.Image", f"{_TFDS}labeled_image.LabeledImage"),
  "ClassLabel": (f"{_TFDS}class_label_feature.ClassLabel",),
}


class Feature(NamedTuple):
  """A feature of the records. kind: the full name of its class in TFDS; facts: what features.json says of it."""

  kind: str
  facts: Mapping[str, Any]

  @property
  def short(self) -> str:
    """The name of the class alone, where it is one of TFDS's own."""
    return self.kind.rpartition(".")[2] if self.kind.startswith(_TFDS) else self.kind


class Metadata(NamedTuple):
  """What is known of a prepared dataset.

  Attributes:
    directory: the version's directory or URL, where the shards are.
    copy: the local directory that the metadata were read from, which TFDS's paths of shards begin with.
    splits: TFDS's SplitDict.
    file_format: e.g. "tfrecord".
    features: the features by name.
    labels: the lines of the label feature's file of class names; none where there is no such file.
  """

  directory: str
  copy: str
  splits: Any
  file_format: str
  features: Mapping[str, Feature]
  labels: Sequence[str]


def read_metadata(config: DataConfig, copy: str, directory: str) -> Metadata:
  """Reads features.json, dataset_info.json and the class names in the directory `copy`; `directory`: where the shards are.

  Raises DataError, and errors of other kinds for files that are not as TFDS writes them.
  """
  info = json.loads(read_text(os.path.join(copy, INFO)))
  file_format = _either(info, "fileFormat", "file_format") or "tfrecord"
  labels = os.path.join(copy, f"{config.label_key.replace('/', '.')}.labels.txt")
  return Metadata(
    directory=directory,
    copy=copy,
    splits=_splits(info, copy, file_format),
    file_format=file_format,
    features=_features(json.loads(read_text(os.path.join(copy, FEATURES))), f"{directory}/{FEATURES}"),
    labels=[line.strip() for line in read_text(labels).split("\n") if line.strip()] if os.path.exists(labels) else [],
  )


def class_names(config: DataConfig, metadata: Metadata) -> Sequence[str]:
  """Returns the names of the classes; raises DataError when the dataset has no such image or label feature."""
  features, where = metadata.features, f"{metadata.directory}/{FEATURES}"
  available = ", ".join(f"{key} ({feature.short})" for key, feature in sorted(features.items())) or "none by name"
  for field, kind in (("image_key", "Image"), ("label_key", "ClassLabel")):
    key = getattr(config, field)
    if key not in features or features[key].kind not in _KINDS[kind]:
      raise DataError(f"config.data.{field}={key!r} is no {kind} feature of {config.name}; it has: {available} ({where})")
  dtype = features[config.image_key].facts.get("dtype", "uint8")
  if dtype not in ("uint8", "uint16"):
    raise DataError(f"the images of {config.name} are {dtype}, not encoded as uint8 or uint16 ({where})")
  facts = features[config.label_key].facts
  count = _either(facts, "numClasses", "num_classes") or len(metadata.labels)
  if not str(count).isdecimal() or not 0 < int(count) <= MOST_CLASSES:
    raise DataError(f"{where}: {config.label_key} has {count} classes; expected 1 to {MOST_CLASSES:,}")
  count = int(count)
  names = metadata.labels or [*map(str, range(count))]
  if len(names) != count or len({*names}) != count:
    raise DataError(
      f"{metadata.directory}/{config.label_key}.labels.txt has {len({*names}):,} different names in {len(names):,} lines, "
      f"but {FEATURES} says that there are {count:,} classes"
    )
  return names


def read_text(path: str) -> str:
  """Reads a file of metadata; raises DataError when it is none that can be read, or too large."""
  try:
    return read_regular(path, LARGEST).decode()
  except OSError as error:
    raise DataError(f"{path} cannot be read: {reason(error)}") from error


def _splits(info: dict[str, Any], copy: str, file_format: str) -> Any:
  """Returns TFDS's SplitDict, which computes the shards of split expressions, from the content of dataset_info.json."""
  from etils import epath
  from tensorflow_datasets.core import naming, splits

  template = naming.ShardedFileTemplate(dataset_name=info["name"], data_dir=epath.Path(copy), filetype_suffix=file_format)
  infos = []
  for split in info.get("splits", []):
    lengths = [int(length) for length in _either(split, "shardLengths", "shard_lengths") or []]
    if min(lengths, default=0) < 0:
      raise DataError(f"{copy}/{INFO}: a shard of {split['name']!r} has {min(lengths):,} records; expected at least 0")
    path = template.replace(split=split["name"], template=_either(split, "filepathTemplate", "filepath_template") or "")
    infos.append(splits.SplitInfo(name=split["name"], shard_lengths=lengths, num_bytes=0, filename_template=path))
  return splits.SplitDict(infos)


def _either(value: Mapping[str, Any], *names: str) -> Any:
  """Returns the field of the first of some names that is there; a protobuf message in JSON may spell a field in two ways."""
  return next((value[name] for name in names if name in value), None)


def _features(value: Any, where: str) -> dict[str, Feature]:
  """Returns the features that a FeaturesDict has; `where` names the file."""
  whole = _feature(value, where)
  if whole.kind != _DICT:
    raise DataError(f"{where}: expected {_DICT} as the class of the whole, got {whole.kind}")
  features = whole.facts.get("features", whole.facts)
  return {str(key): _feature(feature, where) for key, feature in features.items()}


def _feature(value: Any, where: str) -> Feature:
  """Returns a feature from any of the forms that TFDS has written.

  Today's is {"pythonClassName": …, "image": {facts}}, with "image" named after the kind. Before version 4.6 it was {"type": …,
  "content": facts}, in which the facts could also be JSON in a string.
  """
  if isinstance(value, dict):
    kind = _either(value, "pythonClassName", "python_class_name", "type")
    facts = value.get("content")
    if isinstance(facts, str):
      facts = json.loads(facts) if facts else {}
    elif facts is None:
      facts = next((fact for fact in value.values() if isinstance(fact, dict)), {})
    if isinstance(kind, str) and isinstance(facts, dict):
      return Feature(kind, facts)
  raise DataError(f"{where}: a feature is {json.dumps(value)[:60]}; expected its class and its facts")
