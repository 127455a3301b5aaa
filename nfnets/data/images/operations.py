"""Operations of RandAugment and AutoAugment on uint8 images [height, width, 3], RGB, by OpenCV and lookup tables.

They give the pixels of the NFNet release (google-deepmind/deepmind-research, nfnets/autoaugment.py) on TensorFlow 2.15; its
accidents are mirrored, and each is named in its docstring. A rotation may choose the other of two pixels that are equally
near, for a few pixels in a million.

No function here modifies its input; an operation that changes nothing may return the image that it was given. All are
thread-safe, and OpenCV releases the GIL. The 16-bit tables of `_blend` were tried on OpenCV 5.0.
"""

import functools
import math

import cv2
import numpy as np

GREY = 128  # fills the pixels that an operation uncovers

# ---- point operations


def invert(image: np.ndarray) -> np.ndarray:
  """Replaces every value by 255 minus the value."""
  return cv2.bitwise_not(image)


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
  """Keeps the upper `bits` bits of every value.

  As in the release, at least one bit is kept, because TensorFlow shifts a byte by 7 at most. For more than 8 bits (levels
  from 22.5 on) its shift wraps around to far more than 7, so that one bit is kept there too.
  """
  shift = min((8 - bits) % 256, 7)
  return image & np.uint8(0xFF >> shift << shift)


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
  """Inverts the values from `threshold` on.

  As in the release, the threshold is a byte: level 10 (256) inverts everything, and level 15 (384) is level 5 (128).
  """
  return image ^ -(image >= np.uint8(threshold % 256)).view(np.uint8)


def solarize_add(image: np.ndarray, addition: int) -> np.ndarray:
  """Adds `addition` to the values below 128; the sum stays at 255 or below."""
  return cv2.add(image, (image < 128).view(np.uint8) * np.uint8(min(addition, 255)))


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
  """Moves values away from black (factor > 1) or towards it."""
  return image if factor == 1 else cv2.LUT(image, _blend_with(0, factor))


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
  """Moves values away from a grey (factor > 1) or towards it.

  The grey is not the mean of the image: the release (`contrast`) divides the sum of the *histogram*, which is the number of
  pixels, by 256. The grey is 144 for every image of 192×192 pixels, and 255 from 256×256 on.
  """
  height, width = image.shape[:2]
  return image if factor == 1 else cv2.LUT(image, _blend_with(min(height * width // 256, 255), factor))


def autocontrast(image: np.ndarray) -> np.ndarray:
  """Stretches each channel to 0 … 255; leaves a channel with a single value alone."""
  planes = []
  for plane in cv2.split(image):
    low, high = (np.float32(bound) for bound in cv2.minMaxLoc(plane)[:2])
    if low == high or (low == 0 and high == 255):
      planes.append(plane)
      continue
    scale = np.float32(255) / (high - low)
    table = np.clip(np.arange(256, dtype=np.float32) * scale - low * scale, 0, 255).astype(np.uint8)
    planes.append(cv2.LUT(plane, table))
  return cv2.merge(planes)


def equalize(image: np.ndarray) -> np.ndarray:
  """Flattens each channel's histogram as PIL does.

  A channel in which fewer than 255 pixels are below its highest value is left alone.
  """
  histograms = np.array([cv2.calcHist([image], [channel], None, [256], [0, 256]) for channel in range(3)]).astype(np.int64)
  histograms = histograms.reshape(3, 256)
  below = np.cumsum(histograms, axis=1) - histograms
  steps = np.max(below, axis=1, where=histograms > 0, initial=0, keepdims=True) // 255
  tables = np.where(steps > 0, np.minimum((below + steps // 2) // np.maximum(steps, 1), 255), np.arange(256)).astype(np.uint8)
  return cv2.merge([cv2.LUT(plane, table) for plane, table in zip(cv2.split(image), tables, strict=True)])


# ---- blends with another image, by a table of 65,536 entries for each factor


def color(image: np.ndarray, factor: float) -> np.ndarray:
  """Moves values away from the image in grey (factor > 1) or towards it."""
  if factor == 1:
    return image
  grey = cv2.transform(image, _GREY_WEIGHTS)
  return _blend(cv2.merge([grey, grey, grey]), image, factor)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
  """Moves values away from the smoothed image (factor > 1) or towards it; the outermost pixels stay as they are.

  The sum over the 3×3 neighbourhood is truncated to bytes, so that its rounding matters: it is computed in float32 and in
  the order of the release's convolution.
  """
  height, width = image.shape[:2]
  if factor == 1 or min(height, width) < 3:
    return image
  # All rows are seen as one dimension: the next pixel is 3 entries further, the pixel below it `stride` entries. Sum i
  # belongs to the pixel below and to the right of entry i; sums at the ends of rows mix two rows, and are overwritten with
  # the original at the end.
  stride, flat = 3 * width, image.reshape(-1)
  values = flat.astype(np.float32)
  outer, centre = values * (np.float32(1) / np.float32(13)), values * (np.float32(5) / np.float32(13))
  size = len(flat) - 2 * stride - 6
  total = outer[:size] + outer[3 : 3 + size]
  for offset in (6, stride, stride + 3, stride + 6, 2 * stride, 2 * stride + 3, 2 * stride + 6):
    total += (centre if offset == stride + 3 else outer)[offset : offset + size]
  inside = slice(stride + 3, stride + 3 + size)
  result = image.copy()
  result.reshape(-1)[inside] = _blend(total.astype(np.uint8)[None], flat[None, inside], factor)[0]
  result[:, 0], result[:, -1] = image[:, 0], image[:, -1]
  return result


# ---- geometric operations: they take the nearest pixel, or grey beyond the edge


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
  """Rotates about the centre, ((width - 1) / 2, (height - 1) / 2); clockwise if `degrees` < 0."""
  angle = np.float32(degrees) * np.float32(math.pi / 180)
  cos, sin = np.cos(angle), np.sin(angle)
  right, bottom = np.float32(image.shape[1] - 1), np.float32(image.shape[0] - 1)
  return _warp(
    image, cos, -sin, (right - (cos * right - sin * bottom)) / 2, sin, cos, (bottom - (sin * right + cos * bottom)) / 2
  )


def shear_x(image: np.ndarray, slope: float) -> np.ndarray:
  """Moves row y to the left by slope · y pixels: the top row stays."""
  return _warp(image, 1, slope, 0, 0, 1, 0)


def shear_y(image: np.ndarray, slope: float) -> np.ndarray:
  """Moves column x up by slope · x pixels: the left column stays."""
  return _warp(image, 1, 0, 0, slope, 1, 0)


def translate_x(image: np.ndarray, pixels: float) -> np.ndarray:
  """Moves the image to the left."""
  result = np.full_like(image, GREY)
  target, source = _shifted(image.shape[1], pixels)
  result[:, target] = image[:, source]
  return result


def translate_y(image: np.ndarray, pixels: float) -> np.ndarray:
  """Moves the image up."""
  result = np.full_like(image, GREY)
  target, source = _shifted(image.shape[0], pixels)
  result[target] = image[source]
  return result


def cutout(image: np.ndarray, reach: int, row: int, column: int) -> np.ndarray:
  """Fills a square of 2 · `reach` pixels a side around (`row`, `column`) with grey, as far as it is inside the image."""
  result = image.copy()
  result[max(row - reach, 0) : row + reach, max(column - reach, 0) : column + reach] = GREY
  return result


# ---- blending and sampling


_GREY_WEIGHTS = np.array([[0.2989 * 255.5 / 255, 0.587 * 255.5 / 255, 0.114 * 255.5 / 255, -0.5]])


@functools.lru_cache(maxsize=64)
def _blend_table(factor: float) -> np.ndarray:
  """Returns other + factor · (byte - other), clipped and truncated, at byte · 256 + other; uint8 [65536]."""
  values = np.arange(256, dtype=np.float32)
  table = np.float32(factor) * (values[:, None] - values) + values
  table = np.clip(table, 0, 255).astype(np.uint8).ravel()
  table.setflags(write=False)
  return table


def _blend_with(value: int, factor: float) -> np.ndarray:
  """Returns the table that blends a byte with `value`, uint8 [256]."""
  return np.ascontiguousarray(_blend_table(factor)[value::256])


def _blend(other: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
  """Returns other + factor · (image - other), clipped and truncated, of two images of the same shape."""
  rows = len(image)
  pairs = cv2.merge([other.reshape(rows, -1), image.reshape(rows, -1)]).view("<u2")
  return cv2.LUT(pairs, _blend_table(factor)).reshape(image.shape)


def _nearest(coordinates: np.ndarray) -> np.ndarray:
  """Rounds to the nearest whole number, halves away from zero, as TensorFlow's nearest-neighbour sampling does."""
  whole = np.trunc(coordinates)
  return whole + np.copysign(np.abs(coordinates - whole) >= 0.5, coordinates)


@functools.lru_cache(maxsize=256)
def _shifted(size: int, pixels: float) -> tuple[slice, slice]:
  """Returns the parts of an axis that are (filled, copied from) when it is moved by -`pixels`."""
  source = _nearest(np.arange(size, dtype=np.float32) + np.float32(pixels)).astype(np.int64)
  target = np.flatnonzero((source >= 0) & (source < size))
  if not target.size:
    return slice(0), slice(0)
  return slice(target[0], target[-1] + 1), slice(source[target[0]], source[target[-1]] + 1)


@functools.lru_cache(maxsize=32)  # an image size and a recipe need a few, of 4 · height · width bytes each
def _sources(height: int, width: int, *affine: float) -> np.ndarray:
  """Returns the column and row that each pixel is taken from, int16 [height, width, 2]; for grey, -1 or beyond the edge."""
  xx, xy, x0, yx, yy, y0 = (np.float32(entry) for entry in affine)
  x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
  sources = np.stack([_nearest(xx * x + xy * y + x0), _nearest(yx * x + yy * y + y0)], axis=-1)
  sources = np.clip(sources, -1, np.iinfo(np.int16).max).astype(np.int16)
  sources.setflags(write=False)
  return sources


def _warp(image: np.ndarray, *affine: float) -> np.ndarray:
  """Takes pixel (x, y) from (xx · x + xy · y + x0, yx · x + yy · y + y0), in float32. affine: xx, xy, x0, yx, yy, y0."""
  sources = _sources(*image.shape[:2], *(float(entry) for entry in affine))
  # pyrefly: ignore[no-matching-overload]  # OpenCV's stubs lack None for the second map, which its manual allows
  return cv2.remap(image, sources, None, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=(GREY,) * 3)
