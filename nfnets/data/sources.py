"""Where images come from: scikit-learn's digits, any prepared TFDS dataset of equally large images, synthetic ones.

All of them are held in memory, as uint8; none needs TensorFlow.
"""
import dataclasses
import difflib
import logging
import os

import numpy as np

from nfnets.config import DataConfig


class DataError(ValueError):
  """The data is not there, or not what the configuration says."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Images:
  """images: uint8 [n, height, width, 3]; labels: int32 [n], in [0, num_classes)."""

  images: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  def __len__(self) -> int:
    return len(self.labels)


def load(config: DataConfig, *, train: bool) -> Images:
  """The training or the test images.

  Raises DataError when the dataset is unknown or not prepared, the split is missing or empty, images differ in size, or
  `config.num_classes` or `config.image_size` disagree with the data.
  """
  config.validate()
  split = config.train_split if train else config.test_split
  if config.name == "digits":
    found = _digits(split)
  elif config.name == "synthetic":
    found = _synthetic(config, split)
  else:
    found = _tfds(config, split)
  if not len(found):
    raise DataError(f"split {split!r} of {config.name} is empty (config.data.{'train' if train else 'test'}_split)")
  if config.num_classes not in (None, found.num_classes):
    raise DataError(f"config.data.num_classes={config.num_classes}, but {config.name} has {found.num_classes} classes "
                    f"(set it to {found.num_classes}, or leave it unset)")
  size = found.images.shape[1:3]
  if config.image_size and size != (config.image_size,) * 2:
    raise DataError(f"config.data.image_size={config.image_size}, but the images of {config.name} are {size[0]}×{size[1]} "
                    "(leave it unset to take them as they are)")
  return found


def _digits(split: str) -> Images:
  """1,797 scans of handwritten digits, 8×8 pixels, 17 grey levels: a fixed stratified 80 % to train on, 20 % to test."""
  from sklearn import datasets, model_selection
  if split not in ("train", "test"):
    raise DataError(f"digits has the splits 'train' and 'test', got {split!r}")
  scans = datasets.load_digits()
  pixels = np.round(scans.images * (255 / 16)).astype(np.uint8)
  index = model_selection.train_test_split(np.arange(len(pixels)), test_size=0.2, random_state=0, stratify=scans.target)
  index = index[0] if split == "train" else index[1]
  images = np.repeat(pixels[index][..., None], 3, axis=-1)
  return Images(images=images, labels=scans.target[index].astype(np.int32), class_names=tuple("0123456789"))


def _synthetic(config: DataConfig, split: str) -> Images:
  """256 images of noise, image_size pixels a side (32 if unset), num_classes classes (1000); the split seeds them."""
  size, classes = config.image_size or 32, config.num_classes or 1000
  rng = np.random.default_rng([*split.encode()])
  images, labels = rng.integers(0, 256, (256, size, size, 3), np.uint8), rng.integers(0, classes, 256).astype(np.int32)
  return Images(images=images, labels=labels, class_names=tuple(map(str, range(classes))))


def _tfds(config: DataConfig, split: str) -> Images:
  """A dataset as TFDS has prepared it, in memory. Nothing is downloaded: without a network TFDS would retry for minutes."""
  os.environ.setdefault("NO_GCE_CHECK", "true")
  logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS recommends OpenCV at every start
  import tensorflow_datasets as tfds
  from etils import epath
  directory = config.dir or None
  if directory and not os.path.isdir(directory):
    raise DataError(f"config.data.dir={directory!r} is not a directory; {_how_to_prepare(config)}")
  where = directory or os.path.join("~", "tensorflow_datasets")
  try:
    builder = tfds.builder(config.name, data_dir=directory, try_gcs=False)
  except (tfds.core.DatasetNotFoundError, tfds.core.registered.DatasetNotFoundError) as error:
    known = tfds.list_builders(with_community_datasets=False) + ["digits", "synthetic"]
    near = ", ".join(difflib.get_close_matches(config.name, known, n=4, cutoff=0.5)) or "none"
    raise DataError(f"unknown dataset config.data.name={config.name!r}; near: {near}") from error
  if not epath.Path(builder.data_path).exists():
    raise DataError(f"{config.name} is not prepared under {where}; set config.data.dir to where it is, or "
                    f"{_how_to_prepare(config)}")
  if "image" not in builder.info.features or "label" not in builder.info.features:
    raise DataError(f"{config.name} has the features {', '.join(builder.info.features)}; 'image' and 'label' are needed")
  if not hasattr(builder.info.features["label"], "names"):
    raise DataError(f"the labels of {config.name} are {builder.info.features['label']}, not classes")
  try:
    source = builder.as_data_source(split=split)
  except (ValueError, KeyError) as error:
    raise DataError(f"{config.name} has no split {split!r}; it has: {', '.join(builder.info.splits)}") from error
  except NotImplementedError as error:
    raise DataError(f"{config.name} under {where} is not stored as array_record; {_how_to_prepare(config)}") from error
  images, labels = [], []
  for example in source:
    image = example["image"]
    image = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
    if image.dtype != np.uint8 or image.shape[-1] != 3:
      raise DataError(f"the images of {config.name} are {image.dtype} with {image.shape[-1]} channels, not uint8 with 1 or 3")
    if images and image.shape != images[0].shape:
      raise DataError(f"the images of {config.name} differ in size ({images[0].shape[:2]}, {image.shape[:2]}); only datasets of "
                      "equally large images can be read into memory")
    images.append(image)
    labels.append(example["label"])
  return Images(images=np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8), labels=np.asarray(labels, np.int32),
                class_names=tuple(builder.info.features["label"].names))


def _how_to_prepare(config: DataConfig) -> str:
  directory = f" --data_dir={config.dir}" if config.dir else ""
  return f"prepare it once, where tensorflow is installed: tfds build {config.name} --file_format=array_record{directory}"
