"""Applies mixup (1710.09412) and cutmix (1905.04899) to two uint8 images, as in the NFNet release (nfnets/dataset.py).

Every ratio is the share of `image` and of its label; the rest is the partner's.
"""

import math

import cv2
import numpy as np

Box = tuple[int, int, int, int]  # top, left, bottom, right, pixels


def mixup_ratio(rng: np.random.Generator, alpha: float) -> float:
  """Draws from Beta(alpha, alpha), in [0, 1]; alpha > 0."""
  return float(rng.beta(alpha, alpha))


def mixup(image: np.ndarray, partner: np.ndarray, ratio: float) -> np.ndarray:
  """Returns ratio · image + (1 - ratio) · partner, rounded; uint8 [height, width, 3], a new array.

  Raises ValueError where shapes or dtypes differ. The release mixes in float32, before it truncates to bytes.
  """
  _check(image, partner)
  return cv2.addWeighted(image, ratio, partner, 1 - ratio, 0)


def cutmix_box(height: int, width: int, rng: np.random.Generator) -> Box:
  """Draws the part of `image` that cutmix keeps; it may be empty.

  Its centre is uniform over the image. Its share of the area, before it is clipped at the edges, is uniform in (0, 1].
  """
  column, row = int(rng.integers(width)), int(rng.integers(height))
  return box_around(height, width, row, column, rng.random(dtype=np.float32))


def box_around(height: int, width: int, row: int, column: int, outside: float) -> Box:
  """Returns the box whose area is 1 - `outside` of the image and whose centre is (row, column), clipped to the image.

  Its sides are computed in float32 and truncated to whole and to even numbers, as in the release's cutmix_padding.
  """
  side = np.sqrt(np.float32(1) - np.float32(outside))
  rows, columns = int(side * np.float32(height)) // 2, int(side * np.float32(width)) // 2
  return max(row - rows, 0), max(column - columns, 0), min(row + rows, height), min(column + columns, width)


def cutmix(image: np.ndarray, partner: np.ndarray, box: Box) -> tuple[np.ndarray, float]:
  """Returns (`image` inside of `box` and `partner` outside of it, a new array; the box's share of the area).

  Raises ValueError where shapes or dtypes differ.
  """
  _check(image, partner)
  top, left, bottom, right = box
  mixed = partner.copy()
  mixed[top:bottom, left:right] = image[top:bottom, left:right]
  return mixed, (bottom - top) * (right - left) / math.prod(image.shape[:2])


def _check(image: np.ndarray, partner: np.ndarray) -> None:
  """Raises ValueError unless both images are uint8 and of the same shape."""
  if image.shape != partner.shape or image.dtype != np.uint8 or partner.dtype != np.uint8:
    raise ValueError(
      f"cannot mix {image.dtype} {image.shape} with {partner.dtype} {partner.shape}: expected two uint8 images of one shape"
    )
