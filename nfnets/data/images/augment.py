"""RandAugment and AutoAugment on the host: uint8 images [height, width, 3], RGB, by OpenCV and lookup tables.

The 16 operations, their levels and the grey that fills what they uncover are those of the NFNet release
(google-deepmind/deepmind-research, nfnets/autoaugment.py), its accidents included, each named where it is mirrored. On
TensorFlow 2.15 the release gives these pixels; a rotation may take the other of two equally near ones, a few in a million.

No function here modifies its input; one that changes nothing may return the image it was given. All are thread-safe, and
OpenCV releases the GIL. The 16-bit tables of `_blend` were tried on OpenCV 5.0.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

GREY = 128
_MAX_LEVEL = 10


class Reach(NamedTuple):
  """How far, in pixels, level 10 cuts out (half the side of the square) and translates."""

  cutout: int
  translate: int


RANDAUGMENT_REACH = Reach(cutout=40, translate=100)
AUTOAUGMENT_REACH = Reach(cutout=100, translate=250)


# Point operations.


def invert(image: np.ndarray) -> np.ndarray:
  return cv2.bitwise_not(image)


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
  """Keeps the upper `bits` bits.

  As in the release, at least one is kept: TensorFlow shifts a byte by 7 at most. Beyond 8 (levels from 22.5 on) its shift wraps
  around to far more than 7, so that one bit is kept there too.
  """
  shift = min((8 - bits) % 256, 7)
  return image & np.uint8(0xFF >> shift << shift)


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
  """Inverts the values from `threshold` on.

  As in the release, the threshold is a byte: level 10 (256) inverts everything, and level 15 (384) is level 5 (128).
  """
  return image ^ -(image >= np.uint8(threshold % 256)).view(np.uint8)


def solarize_add(image: np.ndarray, addition: int) -> np.ndarray:
  """Adds `addition` to the values below 128."""
  return cv2.add(image, (image < 128).view(np.uint8) * np.uint8(min(addition, 255)))


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
  """Away from black (factor > 1) or towards it."""
  return image if factor == 1 else cv2.LUT(image, _blend_with(0, factor))


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
  """Away from a grey (factor > 1) or towards it.

  The grey is not the mean: the release (`contrast`) divides the sum of the *histogram*, the number of pixels, by 256. It is
  144 for 192×192 and 255 from 256×256 on, whatever the image.
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
  """Flattens each channel's histogram as PIL does; leaves a channel alone where all but the highest value make < 255 pixels."""
  histograms = np.array([cv2.calcHist([image], [channel], None, [256], [0, 256]) for channel in range(3)]).astype(np.int64)
  histograms = histograms.reshape(3, 256)
  below = np.cumsum(histograms, axis=1) - histograms
  steps = np.max(below, axis=1, where=histograms > 0, initial=0, keepdims=True) // 255
  tables = np.where(steps > 0, np.minimum((below + steps // 2) // np.maximum(steps, 1), 255), np.arange(256)).astype(np.uint8)
  return cv2.merge([cv2.LUT(plane, table) for plane, table in zip(cv2.split(image), tables, strict=True)])


# Blends with another image: one table of 65536 entries for each factor.


def color(image: np.ndarray, factor: float) -> np.ndarray:
  """Away from the image in grey (factor > 1) or towards it."""
  if factor == 1:
    return image
  grey = cv2.transform(image, _GREY_WEIGHTS)
  return _blend(cv2.merge([grey, grey, grey]), image, factor)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
  """Away from the smoothed image (factor > 1) or towards it; the outermost pixels stay as they are.

  The sum over the 3×3 neighbourhood is truncated to bytes, so that its rounding shows: it runs in float32 and in the order of
  the release's convolution.
  """
  height, width = image.shape[:2]
  if factor == 1 or min(height, width) < 3:
    return image
  # Whole rows in one dimension: three entries to the right is the next pixel, `stride` the one below. A sum belongs to the
  # pixel one down and one to the right; those at the rows' ends mix two rows, and the original is put back there.
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


# Geometric operations: the nearest pixel, and grey where there is none.


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
  """About the centre, ((width - 1) / 2, (height - 1) / 2); clockwise where `degrees` < 0."""
  angle = np.float32(degrees) * np.float32(math.pi / 180)
  cos, sin = np.cos(angle), np.sin(angle)
  right, bottom = np.float32(image.shape[1] - 1), np.float32(image.shape[0] - 1)
  return _warp(
    image, cos, -sin, (right - (cos * right - sin * bottom)) / 2, sin, cos, (bottom - (sin * right + cos * bottom)) / 2
  )


def shear_x(image: np.ndarray, slope: float) -> np.ndarray:
  """Row y moves left by slope · y pixels: the top row stays."""
  return _warp(image, 1, slope, 0, 0, 1, 0)


def shear_y(image: np.ndarray, slope: float) -> np.ndarray:
  """Column x moves up by slope · x pixels: the left column stays."""
  return _warp(image, 1, 0, 0, slope, 1, 0)


def translate_x(image: np.ndarray, pixels: float) -> np.ndarray:
  """To the left."""
  result = np.full_like(image, GREY)
  target, source = _shifted(image.shape[1], pixels)
  result[:, target] = image[:, source]
  return result


def translate_y(image: np.ndarray, pixels: float) -> np.ndarray:
  """Upwards."""
  result = np.full_like(image, GREY)
  target, source = _shifted(image.shape[0], pixels)
  result[target] = image[source]
  return result


def cutout(image: np.ndarray, reach: int, row: int, column: int) -> np.ndarray:
  """A grey square of 2 · `reach` pixels around (`row`, `column`), as far as it is inside the image."""
  result = image.copy()
  result[max(row - reach, 0) : row + reach, max(column - reach, 0) : column + reach] = GREY
  return result


# What they share.


_GREY_WEIGHTS = np.array([[0.2989 * 255.5 / 255, 0.587 * 255.5 / 255, 0.114 * 255.5 / 255, -0.5]])


@functools.lru_cache(maxsize=64)
def _blend_table(factor: float) -> np.ndarray:
  """Of byte · 256 + other byte: other + factor · (byte - other), clipped and truncated; uint8 [65536]."""
  values = np.arange(256, dtype=np.float32)
  table = np.float32(factor) * (values[:, None] - values) + values
  table = np.clip(table, 0, 255).astype(np.uint8).ravel()
  table.setflags(write=False)
  return table


def _blend_with(value: int, factor: float) -> np.ndarray:
  return np.ascontiguousarray(_blend_table(factor)[value::256])


def _blend(other: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
  rows = len(image)
  pairs = cv2.merge([other.reshape(rows, -1), image.reshape(rows, -1)]).view("<u2")
  return cv2.LUT(pairs, _blend_table(factor)).reshape(image.shape)


def _nearest(coordinates: np.ndarray) -> np.ndarray:
  """Rounds, halves away from zero, as TensorFlow's nearest-neighbour sampling does."""
  whole = np.trunc(coordinates)
  return whole + np.copysign(np.abs(coordinates - whole) >= 0.5, coordinates)


@functools.lru_cache(maxsize=256)
def _shifted(size: int, pixels: float) -> tuple[slice, slice]:
  """What of an axis is filled when it is moved by -`pixels`, and from where."""
  source = _nearest(np.arange(size, dtype=np.float32) + np.float32(pixels)).astype(np.int64)
  target = np.flatnonzero((source >= 0) & (source < size))
  if not target.size:
    return slice(0), slice(0)
  return slice(target[0], target[-1] + 1), slice(source[target[0]], source[target[-1]] + 1)


# An image size and a recipe need a few of them, 4 · height · width bytes each.
@functools.lru_cache(maxsize=32)
def _sources(height: int, width: int, *affine: float) -> np.ndarray:
  """Column and row that each pixel comes from, int16 [height, width, 2]; -1 or beyond the edge where from none."""
  xx, xy, x0, yx, yy, y0 = (np.float32(entry) for entry in affine)
  x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
  sources = np.stack([_nearest(xx * x + xy * y + x0), _nearest(yx * x + yy * y + y0)], axis=-1)
  sources = np.clip(sources, -1, np.iinfo(np.int16).max).astype(np.int16)
  sources.setflags(write=False)
  return sources


def _warp(image: np.ndarray, *affine: float) -> np.ndarray:
  """Samples at (xx · x + xy · y + x0, yx · x + yy · y + y0), in float32."""
  sources = _sources(*image.shape[:2], *(float(entry) for entry in affine))
  return cv2.remap(image, sources, None, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=(GREY,) * 3)


# Levels, and the two policies.


class Operation(NamedTuple):
  """function(image, *argument(level, reach)), plus what is drawn: "sign" of the argument, "centre" (row, column) after it."""

  function: Callable[..., np.ndarray]
  argument: Callable[[float, Reach], float] | None = None
  draw: str = ""

  def __call__(self, image: np.ndarray, level: float, rng: np.random.Generator, reach: Reach = RANDAUGMENT_REACH) -> np.ndarray:
    """The operation at `level` (10 is the scale's end; RandAugment goes to 30) on uint8 [height, width, 3]."""
    return self.apply(image, level, rng.random(), rng.random(), reach)

  def apply(self, image: np.ndarray, level: float, first: float, second: float, reach: Reach) -> np.ndarray:
    """With two numbers drawn from [0, 1), whether or not it needs them."""
    if self.argument is None:
      return self.function(image)
    argument = self.argument(level, reach)
    if self.draw == "sign":
      return self.function(image, argument if first < 0.5 else -argument)
    if self.draw == "centre":
      return self.function(image, argument, int(first * image.shape[0]), int(second * image.shape[1]))
    return self.function(image, argument)


def _enhance(level: float, _: Reach) -> float:
  return level / _MAX_LEVEL * 1.8 + 0.1


def _slope(level: float, _: Reach) -> float:
  return level / _MAX_LEVEL * 0.3


def _distance(level: float, reach: Reach) -> float:
  return level / _MAX_LEVEL * reach.translate


OPERATIONS: dict[str, Operation] = {
  "AutoContrast": Operation(autocontrast),
  "Equalize": Operation(equalize),
  "Invert": Operation(invert),
  "Rotate": Operation(rotate, lambda level, _: level / _MAX_LEVEL * 30, "sign"),
  "Posterize": Operation(posterize, lambda level, _: int(level / _MAX_LEVEL * 4)),
  "Solarize": Operation(solarize, lambda level, _: int(level / _MAX_LEVEL * 256)),
  "SolarizeAdd": Operation(solarize_add, lambda level, _: int(level / _MAX_LEVEL * 110)),
  "Color": Operation(color, _enhance),
  "Contrast": Operation(contrast, _enhance),
  "Brightness": Operation(brightness, _enhance),
  "Sharpness": Operation(sharpness, _enhance),
  "ShearX": Operation(shear_x, _slope, "sign"),
  "ShearY": Operation(shear_y, _slope, "sign"),
  "TranslateX": Operation(translate_x, _distance, "sign"),
  "TranslateY": Operation(translate_y, _distance, "sign"),
  "Cutout": Operation(cutout, lambda level, reach: int(level / _MAX_LEVEL * reach.cutout), "centre"),
}
_NAMES = tuple(OPERATIONS)

# AutoAugment's ImageNet policy (1805.09501), as in the release's policy_v0: pairs of operation, probability in tenths, level.
_POLICY_V0 = """
Equalize 8 1, ShearY 8 4 | Color 4 9, Equalize 6 3 | Color 4 1, Rotate 6 8 |
Solarize 8 3, Equalize 4 7 | Solarize 4 2, Solarize 6 2 | Color 2 0, Equalize 8 8 |
Equalize 4 8, SolarizeAdd 8 3 | ShearX 2 9, Rotate 6 8 | Color 6 1, Equalize 10 2 |
Invert 4 9, Rotate 6 0 | Equalize 10 9, ShearY 6 3 | Color 4 7, Equalize 6 0 |
Posterize 4 6, AutoContrast 4 7 | Solarize 6 8, Color 6 9 | Solarize 2 4, Rotate 8 9 |
Rotate 10 7, TranslateY 8 9 | ShearX 0 0, Solarize 8 4 | ShearY 8 0, Color 6 4 |
Color 10 0, Rotate 6 2 | Equalize 8 4, Equalize 0 8 | Equalize 10 4, AutoContrast 6 2 |
ShearY 4 7, SolarizeAdd 6 7 | Posterize 8 2, Solarize 6 10 | Solarize 6 8, Equalize 6 1 |
Color 8 6, Rotate 4 5
"""
POLICY_V0 = tuple(
  tuple((name, int(tenths) / 10, int(level)) for name, tenths, level in (step.split() for step in pair.split(",")))
  for pair in _POLICY_V0.split("|")
)


def randaugment(image: np.ndarray, rng: np.random.Generator, *, layers: int, magnitude: float) -> np.ndarray:
  """RandAugment (1909.13719): `layers` operations one after the other, each drawn from all 16, all at level `magnitude`.

  image: uint8 [height, width, 3]. Raises ValueError for anything else. Draws the same amount from `rng` whatever comes up.
  """
  image = _checked(image)
  picks = rng.integers(len(_NAMES), size=layers).tolist()
  draws = rng.random((layers, 2)).tolist()
  for pick, (first, second) in zip(picks, draws, strict=True):
    image = OPERATIONS[_NAMES[pick]].apply(image, magnitude, first, second, RANDAUGMENT_REACH)
  return image


def autoaugment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """AutoAugment's ImageNet policy v0 (1805.09501): one of 25 pairs of operations, each applied with its own probability.

  image: uint8 [height, width, 3]. Raises ValueError for anything else. Draws the same amount from `rng` whatever comes up.
  """
  image = _checked(image)
  steps = POLICY_V0[int(rng.integers(len(POLICY_V0)))]
  for (name, probability, level), (applied, first, second) in zip(steps, rng.random((len(steps), 3)).tolist(), strict=True):
    if applied < probability:
      image = OPERATIONS[name].apply(image, level, first, second, AUTOAUGMENT_REACH)
  return image


def _checked(image: np.ndarray) -> np.ndarray:
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
    raise ValueError(f"image is {image.dtype} {image.shape}: expected uint8 (height, width, 3), RGB, before normalization")
  return np.ascontiguousarray(image)
