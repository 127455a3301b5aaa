"""Images that need no download: scikit-learn's handwritten digits, and noise."""

import numpy as np

from nfnets.config import DataConfig
from nfnets.data.errors import NoSuchSplit
from nfnets.data.sources.base import ArraySource, Source


def digits(split: str) -> Source:
  """Opens scikit-learn's 1,797 scans of handwritten digits: 8×8 pixels, 17 grey levels.

  A fixed stratified 80 % are the split "train", the other 20 % "test". Raises NoSuchSplit for any other split.
  """
  from sklearn import datasets, model_selection

  if split not in ("train", "test"):
    raise NoSuchSplit(f"digits has the splits 'train' and 'test', got {split!r}")
  scans, labels = datasets.load_digits(return_X_y=True)  # float64 [n, 64] in [0, 16], int64 [n]
  pixels = np.round(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
  train, test = model_selection.train_test_split(np.arange(len(pixels)), test_size=0.2, random_state=0, stratify=labels)
  numbers = train if split == "train" else test
  images = np.repeat(pixels[numbers][..., None], 3, axis=-1)
  return ArraySource("digits", split, "0123456789", images, labels[numbers].astype(np.int32))


def synthetic(config: DataConfig, split: str) -> Source:
  """Makes 256 images of noise, config.image_size pixels a side (32 if unset), of config.num_classes classes (1000 if unset).

  The name of the split is their seed.
  """
  size, classes = config.image_size or 32, config.num_classes or 1000
  rng = np.random.default_rng([*split.encode()])
  images, labels = rng.integers(0, 256, (256, size, size, 3), np.uint8), rng.integers(0, classes, 256).astype(np.int32)
  return ArraySource("synthetic", split, [*map(str, range(classes))], images, labels)
