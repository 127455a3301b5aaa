"""Decodes bytes to uint8 pixels, and crops pixels to the square that the network sees.

Pixels are those of TensorFlow's accurate JPEG decoder, bit for bit; EXIF orientation is not applied, as in TFDS.
"""

import functools
import io
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg

Box = tuple[int, int, int, int]  # top, left, height, width, pixels

# The official crop must also cover a tenth of the image (min_object_covered of tf.image.sample_distorted_bounding_box), so
# that the least area is 10 %, not the 8 % of the recipe.
LEAST_COVER = 0.1
ATTEMPTS = 10  # random boxes that are tried
PADDING = 32  # pixels; evaluation takes the central size / (size + 32) of the image


class UnreadableImage(ValueError):
  """The bytes are no image, or not a whole one."""


def pixels(data: bytes) -> np.ndarray:
  """Decodes JPEG, PNG or any other format of Pillow: uint8 [H, W, 3]; grey is repeated, CMYK converted, alpha dropped.

  Raises:
    UnreadableImage: the bytes are empty, truncated, or not an image.
  """
  if data[:3] == b"\xff\xd8\xff":
    try:
      return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
      pass  # CMYK, or libjpeg gave a warning: Pillow distinguishes harmless warnings from truncated files
  return _decode_with_pillow(data)


def _decode_with_pillow(data: bytes) -> np.ndarray:
  from PIL import Image

  if not data:
    raise UnreadableImage("no bytes at all")
  try:
    with Image.open(io.BytesIO(data)) as image:
      if image.mode.startswith("I"):  # 16 bits, of which TensorFlow keeps the upper eight
        grey = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
      return np.array(image.convert("RGB"))
  except (OSError, SyntaxError, ValueError, OverflowError, Image.DecompressionBombError) as error:
    text = str(error)
    raise UnreadableImage("not an image" if "cannot identify" in text else text or type(error).__name__) from error


# ---- training
def inception_box(
  height: int, width: int, size: int, rng: np.random.Generator, area: tuple[float, float], aspect: tuple[float, float]
) -> Box:
  """Draws a random part of the image, or returns its centre after ten attempts that failed.

  The parts are distributed as those of tf.image.sample_distorted_bounding_box: their aspect is uniform, and their height
  uniform among the heights that the area allows.

  Args:
    height: of the image, pixels.
    width: of the image, pixels.
    size: side of the square that the part is resized to, pixels; only the central part depends on it.
    rng: source of the random numbers.
    area: least and largest share of the image's area.
    aspect: least and largest width / height.
  """
  total = height * width
  smallest, largest, cover = area[0] * total, area[1] * total, LEAST_COVER * total
  for _ in range(ATTEMPTS):
    u = rng.random(4).tolist()
    ratio = aspect[0] + u[0] * (aspect[1] - aspect[0])
    low = round((smallest / ratio) ** 0.5)
    high = min(round((largest / ratio) ** 0.5), int((width + 0.5 - 1e-7) / ratio), height)
    h = low + int(u[1] * (high - low + 1)) if low < high else high
    w = round(h * ratio)
    if w * h < smallest:  # because of rounding
      h, w = h + 1, round((h + 1) * ratio)
    elif w * h > largest:
      h, w = h - 1, round((h - 1) * ratio)
    if h < 1 or w < 1 or h > height or w > width or not max(smallest, cover) <= w * h <= largest:
      continue
    if (h, w) == (height, width):
      break  # the official pipeline treats the whole image as a failure
    return int(u[2] * (height - h)), int(u[3] * (width - w)), h, w
  return centre_box(height, width, size)


def centre_box(height: int, width: int, size: int) -> Box:
  """Returns the central square: size / (size + 32) of the shorter side."""
  side = max(1, int(min(height, width) / (size + PADDING) * size))
  return (height - side + 1) // 2, (width - side + 1) // 2, side, side


def crop_and_resize(image: np.ndarray, box: Box, out: np.ndarray) -> None:
  """Writes the box, resized, into `out`, uint8 [S, S, 3].

  It uses OpenCV's bicubic with a = -0.75, because there is no fast implementation of TensorFlow's a = -0.5.
  """
  top, left, height, width = box
  part = image[top : top + height, left : left + width]
  if part.shape == out.shape:
    out[:] = part
  else:
    cv2.resize(part, (out.shape[1], out.shape[0]), dst=out, interpolation=cv2.INTER_CUBIC)


def shift(image: np.ndarray, dy: int, dx: int) -> np.ndarray:
  """Moves the image down by dy and right by dx pixels; the uncovered pixels repeat the edge."""
  rows = np.clip(np.arange(image.shape[0]) - dy, 0, image.shape[0] - 1)
  columns = np.clip(np.arange(image.shape[1]) - dx, 0, image.shape[1] - 1)
  return image[rows[:, None], columns]


# ---- evaluation
def squash(image: np.ndarray, size: int) -> np.ndarray:
  """Resizes any shape to (size + 32)² and crops the central size²: what NFNets were published with."""
  return bicubic(image, (size + PADDING,) * 2, ((PADDING + 1) // 2,) * 2, size)


def crop(image: np.ndarray, size: int) -> np.ndarray:
  """Crops `centre_box` and resizes it to size²: what ResNets and NF-RegNets were published with."""
  rows, columns = image.shape[:2]
  top, left, height, width = centre_box(rows, columns, size)
  return bicubic(image[top : top + height, left : left + width], (size, size), (0, 0), size)


def short_side(image: np.ndarray, size: int) -> np.ndarray:
  """Resizes the shorter side to size / 0.875, keeping the shape, and crops the central size²: the common 256 → 224."""
  height, width = image.shape[:2]
  scale = int(size / 0.875) / min(height, width)
  new_height, new_width = max(size, round(height * scale)), max(size, round(width * scale))
  return bicubic(image, (new_height, new_width), ((new_height - size) // 2, (new_width - size) // 2), size)


TEST_CROPS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"squash": squash, "crop": crop, "short_side": short_side}


def bicubic(image: np.ndarray, resized: tuple[int, int], offset: tuple[int, int], size: int) -> np.ndarray:
  """Resizes an image and returns a square of the result, uint8 [size, size, 3].

  The method is TensorFlow's bicubic (Keys, a = -0.5, half-pixel centres, no antialiasing, weights renormalised at the
  edges), rounded; published accuracies were measured with it.

  Args:
    image: uint8 [height, width, 3].
    resized: (height, width) that the image is resized to.
    offset: (row, column) of the square in the resized image.
    size: side of the square.
  """
  rows = _resample(image.astype(np.float32), _taps(image.shape[0], resized[0], offset[0], size))
  out = cv2.transpose(_resample(cv2.transpose(rows), _taps(image.shape[1], resized[1], offset[1], size)))
  out += 0.5
  return np.clip(out, 0, 255, out=out).astype(np.uint8)


def _resample(image: np.ndarray, taps: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
  """Resizes the first axis, along which whole rows are copied: float32 [n, …] → [size, …]. taps: from `_taps`."""
  positions, weights = taps
  tap = np.empty((len(positions), *image.shape[1:]), np.float32)
  out = np.zeros_like(tap)
  for k in range(4):
    np.take(image, positions[:, k], axis=0, out=tap, mode="clip")
    tap *= weights[:, k, None, None]
    out += tap
  return out


@functools.lru_cache(maxsize=512)
def _taps(before: int, after: int, offset: int, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the four source pixels of each resized pixel, and their weights: int [size, 4], float32 [size, 4]."""
  position = (np.arange(offset, offset + size) + 0.5) * (before / after) - 0.5
  base = np.floor(position).astype(np.int64)
  taps = base[:, None] + np.arange(-1, 3)
  t = np.round((position - base) * 1024) / 1024  # TensorFlow takes weights from a table of 1,024 entries
  x = np.abs(t[:, None] - np.arange(-1, 3))
  weights = np.where(x <= 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
  weights = np.where((taps >= 0) & (taps < before), weights, 0)
  weights /= weights.sum(axis=1, keepdims=True)
  return np.clip(taps, 0, before - 1), weights.astype(np.float32)
