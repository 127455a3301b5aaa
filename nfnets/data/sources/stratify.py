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


def held_out(names: Sequence[str], labels: np.ndarray, share: float) -> np.ndarray:
  """Returns which images are for validation, bool [n]: those whose hash lies in the first `share` of all values.

  An image's side follows from its own name, so that an added image moves no other; hence the share of a class is not exact. Where
  all images of a class lie on one side, the one nearest to the other side stands in there, until one is added that belongs there.
  A class of a single image is for training.

  Args:
    names: of the images, "CLASS/FILE".
    labels: int [n], their classes.
    share: in [0, 1); 0 holds nothing out.
  """
  hashes = _hashes(names)
  chosen = hashes < share
  by_class = np.lexsort((hashes, labels))
  counts = np.bincount(labels)
  for stop, count in zip(np.cumsum(counts), counts, strict=True):
    if count and share:
      chosen[by_class[stop - 1]] = False
      chosen[by_class[stop - count]] = count > 1
  return chosen


def _hashes(names: Sequence[str]) -> np.ndarray:
  """Returns a number in [0, 1) of each name, float64 [n]: the first 48 bits of its SHA-256, which float64 holds exactly."""
  digests = (hashlib.sha256(os.fsencode(name)).digest() for name in names)
  return np.fromiter((int.from_bytes(digest[:6], "big") / 2**48 for digest in digests), np.float64, len(names))
