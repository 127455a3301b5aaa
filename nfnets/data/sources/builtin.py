"""Images that need no download: scikit-learn's handwritten digits, and noise."""

import numpy as np

from nfnets.config import DataConfig
from nfnets.data.errors import NoSuchSplit
from nfnets.data.sources.base import ArraySource, Source


def digits(split: str) -> Source:
  """1,797 scans of handwritten digits, 8×8 pixels, 17 grey levels: a fixed stratified 80 % to train on, 20 % to test."""
  from sklearn import datasets, model_selection

  if split not in ("train", "test"):
    raise NoSuchSplit(f"digits has the splits 'train' and 'test', got {split!r}")
  scans = datasets.load_digits()
  pixels = np.round(scans.images * (255 / 16)).astype(np.uint8)
  index = model_selection.train_test_split(np.arange(len(pixels)), test_size=0.2, random_state=0, stratify=scans.target)
  index = index[0] if split == "train" else index[1]
  images = np.repeat(pixels[index][..., None], 3, axis=-1)
  return ArraySource("digits", split, "0123456789", images, scans.target[index].astype(np.int32))


def synthetic(config: DataConfig, split: str) -> Source:
  """256 images of noise, image_size pixels a side (32 if unset), num_classes classes (1000); the split seeds them."""
  size, classes = config.image_size or 32, config.num_classes or 1000
  rng = np.random.default_rng([*split.encode()])
  images, labels = rng.integers(0, 256, (256, size, size, 3), np.uint8), rng.integers(0, classes, 256).astype(np.int32)
  return ArraySource("synthetic", split, [*map(str, range(classes))], images, labels)
