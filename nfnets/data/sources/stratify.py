"""Divides images of classes by the SHA-256 of their names: equal on every machine, and no class falls to one side alone."""

import hashlib
import os
from collections.abc import Sequence

import numpy as np


def mixed_order(names: Sequence[str], labels: np.ndarray) -> np.ndarray:
  """Returns an order of images of which every stretch has all classes in proportion, as far as numbers allow.

  A class's images come in the order of their hashes, evenly spaced: the image at rank r of n lies at (r + 1/2) / n.

  Args:
    names: of the images, "CLASS/FILE".
    labels: int [n], their classes.

  Returns:
    int64 [n], numbers of images, the first of the order first.
  """
  hashes = _hashes(names)
  by_class = np.lexsort((hashes, labels))
  counts = np.bincount(labels)
  firsts = np.cumsum(counts) - counts
  classes = labels[by_class]
  places = np.empty(len(labels))
  places[by_class] = (np.arange(len(labels)) - firsts[classes] + 0.5) / counts[classes]
  return np.lexsort((hashes, places))


def _hashes(names: Sequence[str]) -> np.ndarray:
  """Returns a number in [0, 1) of each name, float64 [n]: the first 48 bits of its SHA-256, which float64 holds exactly."""
  digests = (hashlib.sha256(os.fsencode(name)).digest() for name in names)
  return np.fromiter((int.from_bytes(digest[:6], "big") / 2**48 for digest in digests), np.float64, len(names))
