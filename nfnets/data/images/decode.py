"""Decodes bytes to uint8 pixels, and crops pixels to the square that the network sees.

Pixels are those of TensorFlow's accurate JPEG decoder, bit for bit. The bytes may come from anyone: docs/security.md.
"""

import dataclasses
import functools
import io
import warnings
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, TiffImagePlugin

from nfnets.data.errors import UnreadableImage
from nfnets.data.images import limits

Box = tuple[int, int, int, int]  # top, left, height, width, pixels

# The official crop must also cover a tenth of the image (min_object_covered of tf.image.sample_distorted_bounding_box), so
# that the least area is 10 %, not the 8 % of the recipe.
LEAST_COVER = 0.1
ATTEMPTS = 10  # random boxes that are tried
PADDING = 32  # pixels; evaluation takes the central size / (size + 32) of the image
_RESIZED_WHOLE = 1 << 24  # pixels; larger results are not made for the sake of a square of them
_JPEG = b"\xff\xd8\xff"  # how every JPEG begins

# Pillow warns of images that are large, but not larger than config.data.max_pixels has been set to, or that we refuse.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# ---- from bytes to pixels


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
  """Which images are decoded, and how.

  formats: Pillow's names of the formats that are opened at all; max_pixels: the most pixels of an image; upright: whether the
  orientation that EXIF tells is applied. The defaults are those of config.data.
  """

  formats: tuple[str, ...] = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
  max_pixels: int = 1 << 26
  upright: bool = False


DEFAULT_RULES = Rules()


def pixels(data: bytes, rules: Rules = DEFAULT_RULES) -> np.ndarray:
  """Decodes the first picture of a file: uint8 [H, W, 3]; grey is repeated, CMYK converted, alpha dropped, 16 bits become 8.

  Raises:
    UnreadableImage: the bytes are empty, truncated, no image, or one that the rules or `limits` refuse.
  """
  if not data:
    raise UnreadableImage("no bytes at all")
  try:
    if data[:3] == _JPEG and "JPEG" in rules.formats:
      try:
        limits.check_jpeg(data, rules.max_pixels)
        image = simplejpeg.decode_jpeg(data, "RGB")
        return turned(image, orientation(data, rules))
      except UnreadableImage:
        raise
      except ValueError:
        pass  # CMYK, or libjpeg gave a warning: Pillow distinguishes harmless warnings from truncated files
    return _decode_with_pillow(data, rules)
  except UnreadableImage:
    raise
  except Image.DecompressionBombError as error:
    raise UnreadableImage(f"more pixels than config.data.max_pixels={rules.max_pixels:,} allows") from error
  except Exception as error:  # of any kind: decoders raise what they like for hostile bytes
    text = " ".join(str(error).split())
    raise UnreadableImage("not an image" if "cannot identify" in text else text or type(error).__name__) from error


def _decode_with_pillow(data: bytes, rules: Rules) -> np.ndarray:
  with Image.open(io.BytesIO(data), formats=rules.formats) as image:
    limits.check_size(*image.size, rules.max_pixels)
    if data[:3] == _JPEG:
      limits.check_jpeg_bytes(data, *image.size)
    else:
      limits.check_bytes(len(data), *image.size)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
      limits.check_tiff(data, image, rules.max_pixels)
    # Pillow turns a TIFF when it reads the pixels, always.
    turn = _orientation(image) if rules.upright and image.format != "TIFF" else 1
    if image.mode.startswith("I"):  # 16 bits, of which TensorFlow keeps the upper eight
      grey = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
      return turned(np.repeat(grey[..., None], 3, axis=-1), turn)
    image.load()
    image.info.pop("transparency", None)  # alpha is dropped, of which Pillow would warn
    return turned(np.array(image if image.mode == "RGB" else image.convert("RGB")), turn)


# ---- EXIF orientation


def orientation(data: bytes, rules: Rules) -> int:
  """Returns the orientation, 1 to 8, that EXIF tells of an image that can be decoded; 1 where the rules leave it as it is."""
  if not rules.upright:
    return 1
  if data[:3] == _JPEG:  # Pillow is slow: it is asked only about those JPEGs that may have another orientation than 1
    end = limits.jpeg_header(data).end
    if data.find(b"Exif\0\0", 0, end) < 0 and data.find(b"tiff:Orientation", 0, end) < 0:
      return 1
  with Image.open(io.BytesIO(data), formats=rules.formats) as image:
    return _orientation(image)


def _orientation(image: Image.Image) -> int:
  """Returns the orientation in the EXIF data of an open image, 1 to 8; 1 where there is none, or none that can be read."""
  try:
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
  except Exception:  # Pillow's parser raises errors of many kinds for damaged EXIF data, which are no reason to lose the image
    return 1
  return value if value in range(1, 9) else 1


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
  """Returns an image as it is meant to be seen: [H, W, 3], or [W, H, 3] for orientations 5 to 8 (EXIF 2.32, tag 274)."""
  if orientation == 1:
    return image
  if orientation >= 5:
    image = image.transpose(1, 0, 2)
  rows = -1 if orientation in (3, 4, 7, 8) else 1
  columns = -1 if orientation in (2, 3, 6, 7) else 1
  return np.ascontiguousarray(image[::rows, ::columns])


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


def centre_box(height: int, width: int, size: int, share: float | None = None) -> Box:
  """Returns the central square: size / (size + 32) of the shorter side, or the given share of it."""
  side = max(1, int(min(height, width) / (size + PADDING) * size if share is None else min(height, width) * share))
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
Resize = Callable[[np.ndarray, tuple[int, int], tuple[int, int], int], np.ndarray]  # as `bicubic`


def test_image(
  image: np.ndarray, size: int, *, crop: str, crop_pct: float | None = None, resize: str = "tensorflow"
) -> np.ndarray:
  """Cuts the square out of an image that an evaluation shows.

  Args:
    image: uint8 [height, width, 3].
    size: side of the square, pixels.
    crop, crop_pct, resize: as config.data.test_crop (not "none"), test_crop_pct and test_resize.
  """
  return _TEST_CROPS[crop](image, size, crop_pct, _RESIZES[resize])


def resized_side(size: int, *, crop: str, crop_pct: float | None = None) -> int:
  """Side, or shorter side, of the resized image that the central size² is cut out of, pixels; "crop" cuts it out before."""
  if crop == "none":
    return size
  return int(size / (crop_pct or 0.875)) if crop_pct or crop == "short_side" else size + PADDING


def _squash(image: np.ndarray, size: int, share: float | None, resize: Resize) -> np.ndarray:
  """Resizes any shape to (size + 32)² and crops the central size²: what NFNets were published with."""
  side = resized_side(size, crop="squash", crop_pct=share)
  return resize(image, (side, side), (_centred(side, size),) * 2, size)


def _crop(image: np.ndarray, size: int, share: float | None, resize: Resize) -> np.ndarray:
  """Crops the central square and resizes it to size²: what ResNets and NF-RegNets were published with."""
  top, left, height, width = centre_box(image.shape[0], image.shape[1], size, share)
  return resize(image[top : top + height, left : left + width], (size, size), (0, 0), size)


def _short_side(image: np.ndarray, size: int, share: float | None, resize: Resize) -> np.ndarray:
  """Resizes the shorter side to size / 0.875, keeping the shape, and crops the central size²; rounds as torchvision does."""
  short = resized_side(size, crop="short_side", crop_pct=share)
  height, width = (int(short * side / min(image.shape[:2])) for side in image.shape[:2])
  return resize(image, (height, width), (_centred(height, size), _centred(width, size)), size)


_TEST_CROPS = {"squash": _squash, "crop": _crop, "short_side": _short_side}


def _centred(whole: int, part: int) -> int:
  return round((whole - part) / 2)


def antialiased(image: np.ndarray, resized: tuple[int, int], offset: tuple[int, int], size: int) -> np.ndarray:
  """As `bicubic`, but Pillow's, whose filter grows with the shrinking."""
  (height, width), (top, left) = resized, offset
  picture, bicubic = Image.fromarray(image), Image.Resampling.BICUBIC
  if height * width <= _RESIZED_WHOLE:
    return np.asarray(picture.resize((width, height), bicubic))[top : top + size, left : left + size]
  across, down = image.shape[1] / width, image.shape[0] / height  # an image of an extreme shape: the square alone
  box = left * across, top * down, (left + size) * across, (top + size) * down
  return np.asarray(picture.resize((size, size), bicubic, box=box))


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
  rows, *row_taps = _taps(image.shape[0], resized[0], offset[0], size, 4)
  columns, *column_taps = _taps(image.shape[1], resized[1], offset[1], size, 32)
  # Of an image that is much larger than the result, few pixels are looked at: the others must take no memory as floats. To
  # choose columns is slow, and left to images of extreme shapes.
  image = image if rows is None else image[rows]
  image = image if columns is None else image[:, columns]
  out = cv2.transpose(_resample(cv2.transpose(_resample(image.astype(np.float32), *row_taps)), *column_taps))
  out += 0.5
  return np.clip(out, 0, 255, out=out).astype(np.uint8)


_RESIZES: dict[str, Resize] = {"tensorflow": bicubic, "pillow": antialiased}


def _resample(image: np.ndarray, positions: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Resizes the first axis, along which whole rows are copied: float32 [n, …] → [size, …]. The rest is from `_taps`."""
  tap = np.empty((len(positions), *image.shape[1:]), np.float32)
  out = np.zeros_like(tap)
  for k in range(4):
    np.take(image, positions[:, k], axis=0, out=tap, mode="clip")
    tap *= weights[:, k, None, None]
    out += tap
  return out


@functools.lru_cache(maxsize=512)
def _taps(before: int, after: int, offset: int, size: int, factor: int) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
  """Returns what makes the resized pixels of an axis.

  They are: the pixels that are needed, int [n], or None where all are kept, because they are at most `factor` · size; the
  places among them of the four for each resized pixel, int [size, 4]; and the weights of these, float32 [size, 4].
  """
  position = (np.arange(offset, offset + size) + 0.5) * (before / after) - 0.5
  base = np.floor(position).astype(np.int64)
  taps = base[:, None] + np.arange(-1, 3)
  t = np.round((position - base) * 1024) / 1024  # TensorFlow takes weights from a table of 1,024 entries
  x = np.abs(t[:, None] - np.arange(-1, 3))
  weights = np.where(x <= 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
  weights = np.where((taps >= 0) & (taps < before), weights, 0)
  weights /= weights.sum(axis=1, keepdims=True)
  taps, weights = np.clip(taps, 0, before - 1), weights.astype(np.float32)
  if before <= factor * size:
    return None, taps, weights
  needed, places = np.unique(taps, return_inverse=True)
  return needed, places.reshape(taps.shape), weights
