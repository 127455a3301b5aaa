"""Opens the source that a configuration names."""

from collections.abc import Callable

from nfnets.config import DataConfig
from nfnets.data.errors import DataError, NoSuchSplit
from nfnets.data.images import decode
from nfnets.data.sources.base import Source
from nfnets.data.sources.builtin import digits, synthetic


def open_source(config: DataConfig, split: str, *, progress: Callable[[str], None] = lambda line: None) -> Source:
  """Opens the images of a split of the dataset that `config` names.

  Args:
    config: the dataset, where it is, and the features that are read.
    split: a split expression such as "train[:98%]"; callers pass config.train_split or config.test_split.
    progress: called with one line about each step that takes long.

  Raises:
    DataError: the dataset is unknown or not prepared, cannot be read, is cut short, has no such split or feature, the split is
      empty, or `config.num_classes` disagrees with the data.
  """
  config.validate()
  try:
    source = _open(config, split, progress)
  except NoSuchSplit as error:
    raise DataError(f"{error}{_field_of(config, split)}") from error
  # A TFDS dataset is read as TFDS reads it, for which published accuracies were measured: without EXIF's orientation.
  source.rules = decode.Rules(tuple(config.formats), config.max_pixels, upright=config.name == "folder")
  if not len(source):
    raise DataError(f"split {split!r} of {config.name} is empty{_field_of(config, split)}")
  if config.num_classes not in (None, source.num_classes):
    raise DataError(
      f"config.data.num_classes={config.num_classes}, but {config.name} has {source.num_classes} classes "
      f"(set it to {source.num_classes}, or leave it unset)"
    )
  return source


def _open(config: DataConfig, split: str, progress: Callable[[str], None]) -> Source:
  if config.name == "digits":
    return digits(split)
  if config.name == "synthetic":
    return synthetic(config, split)
  if config.name == "folder":
    from nfnets.data.sources.folder import open_folder

    return open_folder(config, split, progress)
  from nfnets.data.sources.tfds import open_tfds

  return open_tfds(config, split, progress)


def _field_of(config: DataConfig, split: str) -> str:
  """Returns the field that holds this split expression, in brackets for the end of a message; empty if there is none."""
  fields = [field for field in ("train_split", "test_split") if getattr(config, field) == split]
  return f" (config.data.{fields[0]})" if fields else ""
