"""Opens the source that a configuration names."""

from collections.abc import Callable

from nfnets.config import DataConfig
from nfnets.data.errors import DataError
from nfnets.data.sources.base import Source
from nfnets.data.sources.builtin import digits, synthetic


def open_source(config: DataConfig, *, train: bool, progress: Callable[[str], None] = lambda line: None) -> Source:
  """The training or the test images. `progress` is told, in one line each, of what takes long.

  Raises DataError when the dataset is unknown or not prepared, cannot be read, is cut short, has no such split or feature,
  the split is empty, or `config.num_classes` disagrees with the data.
  """
  config.validate()
  split = config.train_split if train else config.test_split
  if config.name == "digits":
    found = digits(split)
  elif config.name == "synthetic":
    found = synthetic(config, split)
  elif config.name == "folder":
    from nfnets.data.sources.folder import open_folder

    found = open_folder(config.dir, split, progress)
  else:
    from nfnets.data.sources.tfds import open_tfds

    found = open_tfds(config, split, progress)
  if not len(found):
    raise DataError(f"split {split!r} of {config.name} is empty (config.data.{'train' if train else 'test'}_split)")
  if config.num_classes not in (None, found.num_classes):
    raise DataError(
      f"config.data.num_classes={config.num_classes}, but {config.name} has {found.num_classes} classes "
      f"(set it to {found.num_classes}, or leave it unset)"
    )
  return found
