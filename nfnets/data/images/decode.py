"""From encoded bytes to uint8 pixels, and from pixels to the square that the network sees.

Pixels are those of TensorFlow's accurate JPEG decoder, bit for bit; EXIF orientation is not applied, as in TFDS.
"""

import functools
import io
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg

Box = tuple[int, int, int, int]  # top, left, height, width, pixels

# The official crop must also cover a tenth of the image (tf.image.sample_distorted_bounding_box's min_object_covered), so
# that the least area is 10 %, whatever the 8 % of the recipe say.
LEAST_COVER = 0.1
ATTEMPTS = 10
PADDING = 32  # evaluation looks at the central size / (size + 32) of the image


class UnreadableImage(ValueError):
  """The bytes are no image, or not a whole one."""


def pixels(data: bytes) -> np.ndarray:
  """JPEG, PNG or whatever else Pillow reads → uint8 [H, W, 3]; grey is repeated, CMYK converted, alpha dropped.

  Raises:
    UnreadableImage: empty, truncated, or not an image.
  """
  if data[:3] == b"\xff\xd8\xff":
    try:
      return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
      pass  # CMYK, and whatever libjpeg warns of: Pillow tells the harmless from the truncated
  return _by_pillow(data)


def _by_pillow(data: bytes) -> np.ndarray:
  from PIL import Image

  if not data:
    raise UnreadableImage("no bytes at all")
  try:
    with Image.open(io.BytesIO(data)) as image:
      if image.mode.startswith("I"):  # 16 bits: the upper eight, as TensorFlow does
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
  """A random part of the image; after ten vain attempts its centre. Distributed as tf.image.sample_distorted_bounding_box:
  aspect uniform, height uniform among those that the area admits."""
  whole = height * width
  least, most, cover = area[0] * whole, area[1] * whole, LEAST_COVER * whole
  for _ in range(ATTEMPTS):
    u = rng.random(4).tolist()
    ratio = aspect[0] + u[0] * (aspect[1] - aspect[0])
    low = round((least / ratio) ** 0.5)
    high = min(round((most / ratio) ** 0.5), int((width + 0.5 - 1e-7) / ratio), height)
    h = low + int(u[1] * (high - low + 1)) if low < high else high
    w = round(h * ratio)
    if w * h < least:  # rounding is no reason to fail
      h, w = h + 1, round((h + 1) * ratio)
    elif w * h > most:
      h, w = h - 1, round((h - 1) * ratio)
    if h < 1 or w < 1 or h > height or w > width or not max(least, cover) <= w * h <= most:
      continue
    if (h, w) == (height, width):
      break  # the official pipeline takes the whole image for a failure
    return int(u[2] * (height - h)), int(u[3] * (width - w)), h, w
  return centre_box(height, width, size)


def centre_box(height: int, width: int, size: int) -> Box:
  """The central square: size / (size + 32) of the shorter side."""
  side = max(1, int(min(height, width) / (size + PADDING) * size))
  return (height - side + 1) // 2, (width - side + 1) // 2, side, side


def crop_and_resize(image: np.ndarray, box: Box, out: np.ndarray) -> None:
  """Writes the box, resized, into `out` uint8 [S, S, 3]: OpenCV's bicubic, a = -0.75 (TensorFlow's -0.5 has no fast form)."""
  top, left, height, width = box
  part = image[top : top + height, left : left + width]
  if part.shape == out.shape:
    out[:] = part
  else:
    cv2.resize(part, (out.shape[1], out.shape[0]), dst=out, interpolation=cv2.INTER_CUBIC)


def shift(image: np.ndarray, dy: int, dx: int) -> np.ndarray:
  """Moves the image down by dy and right by dx pixels; what comes in from outside repeats the edge."""
  rows = np.clip(np.arange(image.shape[0]) - dy, 0, image.shape[0] - 1)
  columns = np.clip(np.arange(image.shape[1]) - dx, 0, image.shape[1] - 1)
  return image[rows[:, None], columns]


# ---- evaluation
def squash(image: np.ndarray, size: int) -> np.ndarray:
  """Resized to (size + 32)², whatever its shape, then the central size²: what NFNets were published with."""
  return bicubic(image, (size + PADDING,) * 2, ((PADDING + 1) // 2,) * 2, size)


def crop(image: np.ndarray, size: int) -> np.ndarray:
  """`centre_box`, then resized to size²: what ResNets and NF-RegNets were published with."""
  top, left, height, width = centre_box(*image.shape[:2], size)
  return bicubic(image[top : top + height, left : left + width], (size, size), (0, 0), size)


def short_side(image: np.ndarray, size: int) -> np.ndarray:
  """Shorter side resized to size / 0.875, keeping the shape, then the central size²: the common 256 → 224."""
  height, width = image.shape[:2]
  scale = int(size / 0.875) / min(height, width)
  resized = max(size, round(height * scale)), max(size, round(width * scale))
  return bicubic(image, resized, tuple((side - size) // 2 for side in resized), size)


TEST_CROPS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"squash": squash, "crop": crop, "short_side": short_side}


def bicubic(image: np.ndarray, resized: tuple[int, int], offset: tuple[int, int], size: int) -> np.ndarray:
  """The square [offset, offset + size) of the image resized to `resized` (height, width), uint8.

  TensorFlow's bicubic (Keys, a = -0.5, half-pixel centres, no antialiasing, weights renormalised at the edges), rounded;
  published accuracies were measured with it.
  """
  rows = _resample(image.astype(np.float32), _taps(image.shape[0], resized[0], offset[0], size))
  out = cv2.transpose(_resample(cv2.transpose(rows), _taps(image.shape[1], resized[1], offset[1], size)))
  out += 0.5
  return np.clip(out, 0, 255, out=out).astype(np.uint8)


def _resample(image: np.ndarray, taps: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
  """float32 [n, …] → [size, …]: along the first axis, where whole rows are copied at once."""
  places, weights = taps
  tap = np.empty((len(places), *image.shape[1:]), np.float32)
  out = np.zeros_like(tap)
  for k in range(4):
    np.take(image, places[:, k], axis=0, out=tap, mode="clip")
    tap *= weights[:, k, None, None]
    out += tap
  return out


@functools.lru_cache(maxsize=512)
def _taps(before: int, after: int, offset: int, size: int) -> tuple[np.ndarray, np.ndarray]:
  """(int [size, 4], float32 [size, 4]): the source pixels of each resized one, and their weights."""
  position = (np.arange(offset, offset + size) + 0.5) * (before / after) - 0.5
  base = np.floor(position).astype(np.int64)
  taps = base[:, None] + np.arange(-1, 3)
  t = np.round((position - base) * 1024) / 1024  # TensorFlow looks its weights up in a table of 1,024
  x = np.abs(t[:, None] - np.arange(-1, 3))
  weights = np.where(x <= 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
  weights = np.where((taps >= 0) & (taps < before), weights, 0)
  weights /= weights.sum(axis=1, keepdims=True)
  return np.clip(taps, 0, before - 1), weights.astype(np.float32)
