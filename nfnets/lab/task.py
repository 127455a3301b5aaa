"""What experiments look at: real images, scikit-learn's digits or those of a config file."""

import dataclasses
import functools
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from nfnets.config import DataConfig
from nfnets.data.errors import DataError, UnreadableImage
from nfnets.data.images import decode
from nfnets.data.sources.builtin import digits
from nfnets.data.sources.open import open_source

Labelled = tuple[jax.Array, jax.Array]  # images float32 [n, side, side, channels], labels int32 [n]
PATCH = 2  # pixels a side of the patches that become one place each with all their numbers, which makes training fast
SIDE = 16  # pixels a side to which images of a config file are averaged first
MOST = {"train": 10_000, "test": 2_000}  # images taken of a config file's splits
DIGITS = {"train": 1437, "test": 360}  # how many digits there are
_KEPT: dict[str, tuple[Labelled, int]] = {}
MEAN, STD = 77.8, 95.9  # of the digits' pixels, as in configs/digits.py


@functools.cache
def _split(split: str) -> tuple[np.ndarray, np.ndarray]:
  source = digits(split)
  records = [source[i] for i in range(len(source))]
  images = np.stack([np.asarray(record.image) for record in records])
  return images, np.array([record.label for record in records], np.int32)


def images(
  config: DataConfig | None = None, count: int | None = None, *, split: str = "train", seed: int = 0, side: int = 8
) -> Labelled:
  """Images, normalised, and their labels.

  Args:
    config: whose images; None: the digits, 1,437 for training and 360 for tests.
    count: how many, chosen by `seed`; None takes all, in their order.
    split: "train" or "test".
    seed: of the choice.
    side: pixels a side; of the digits 8 are real, of others `SIDE`, and the nearest one is taken.

  Returns:
    float32 [count, side, side, 3] and int32 [count].
  """
  if config is None:
    pixels, labels = _split(split)
    pixels = (pixels.astype(np.float32) - MEAN) / STD
  else:
    (read, numbers), _ = _read(config, split)
    pixels, labels = np.asarray(read), np.asarray(numbers)
  if count is not None:
    chosen = np.random.default_rng(seed).permutation(len(labels))[:count]
    pixels, labels = pixels[chosen], labels[chosen]
  return jnp.asarray(resized(pixels, side)), jnp.asarray(labels)


def name(config: DataConfig | None) -> str:
  """What people call these images."""
  return "digits" if config is None else config.name


def classes(config: DataConfig | None) -> int:
  """How many classes these images have."""
  return 10 if config is None else _read(config, "train")[1]


def resized(pixels: Any, side: int) -> Any:
  """[n, S, S, C] → [n, side, side, C]: the nearest pixel."""
  nearest = np.arange(side) * pixels.shape[1] // side
  return pixels[:, nearest][:, :, nearest]


@dataclasses.dataclass(frozen=True, slots=True)
class Data:
  """What networks are trained and tested on; `name` for people."""

  name: str
  classes: int
  train: Labelled
  test: Labelled

  @property
  def channels(self) -> int:
    return self.train[0].shape[-1]


def data(config: DataConfig | None, *, cut: bool = True, small: bool = False) -> Data:
  """The digits, 8×8×3; or at most 10,000 training and 2,000 test images of a dataset, averaged to 16×16×3.

  With `small`, those of a dataset are averaged to 8×8×3 and are as many as the digits at most, so that they take no longer. With
  `cut`, each 2×2 pixels become one place with 12 numbers, which makes training fast: see `patches`.

  Raises:
    DataError: as `open_source`, and for an image that cannot be decoded.
  """
  if config is None:
    train, test = images(), images(split="test")
  else:
    (train, _), (test, _) = _read(config, "train"), _read(config, "test")
    train, test = (fewer(train, DIGITS["train"]), fewer(test, DIGITS["test"])) if small else (train, test)
  cut_up = lambda labelled: (patches(labelled[0]), labelled[1]) if cut else labelled
  return Data(name(config), classes(config), cut_up(train), cut_up(test))


def _read(config: DataConfig, split: str) -> tuple[Labelled, int]:
  """Images of the split "train" or "test", which stay in memory, and how many classes there are; see `_load`."""
  key = repr((config, split))
  if key not in _KEPT:
    _KEPT[key] = _load(config, getattr(config, f"{split}_split"), MOST[split])
  return _KEPT[key]


def _load(config: DataConfig, split: str, most: int) -> tuple[Labelled, int]:
  """At most that many images, the same ones each time, normalised, float32 [n, 16, 16, 3], with labels; and how many classes."""
  source = open_source(config, split)
  chosen = np.random.default_rng(0).permutation(len(source))[:most]
  pixels, labels = np.empty((len(chosen), SIDE, SIDE, 3), np.float32), np.empty(len(chosen), np.int32)
  for i, number in enumerate(chosen):
    record = source[int(number)]
    try:
      image = record.image if isinstance(record.image, np.ndarray) else decode.pixels(record.image, source.rules)
    except UnreadableImage as error:
      raise DataError(f"{config.name}, {split}, image number {number}: {error}") from error
    pixels[i], labels[i] = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA), record.label
  source.close()
  pixels = (pixels - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
  return (jnp.asarray(pixels), jnp.asarray(labels)), source.num_classes


def fewer(labelled: Labelled, most: int) -> Labelled:
  """The first images, at most so many, each 2×2 pixels averaged to one."""
  images, labels = labelled[0][:most], labelled[1][:most]
  n, height, width, channels = images.shape
  return images.reshape(n, height // PATCH, PATCH, width // PATCH, PATCH, channels).mean(axis=(2, 4)), labels


def patches(pixels: jax.Array) -> jax.Array:
  """[n, H, W, C] → [n, H / 2, W / 2, 4 C]: all the numbers of each 2×2 pixels at one place."""
  n, height, width, channels = pixels.shape
  parts = pixels.reshape(n, height // PATCH, PATCH, width // PATCH, PATCH, channels).transpose(0, 1, 3, 2, 4, 5)
  return parts.reshape(n, height // PATCH, width // PATCH, -1)


def whole(data: Data) -> Data:
  """The same data, whose images `data` has cut into patches, as images again."""

  def join(labelled: Labelled) -> Labelled:
    images, labels = labelled
    n, height, width, numbers = images.shape
    parts = images.reshape(n, height, width, PATCH, PATCH, numbers // PATCH**2).transpose(0, 1, 3, 2, 4, 5)
    return parts.reshape(n, height * PATCH, width * PATCH, -1), labels

  return dataclasses.replace(data, train=join(data.train), test=join(data.test))
