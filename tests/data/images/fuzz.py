"""Mutates small images of every format that is read, and counts what decoding them comes to."""

import dataclasses
import random
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image

from nfnets.data.errors import UnreadableImage
from nfnets.data.images import decode
from tests.data.images.hostile import small

FORMATS = (*decode.Rules().formats, "AVIF", "JPEG2000", "PPM")
_INTERESTING = (
  b"\0",
  b"\xff",
  b"\x7f",
  b"\x80",
  b"\xff\xff",
  b"\0\0\0\0",
  b"\xff\xff\xff\xff",
  b"\x7f\xff\xff\xff",
  b"\0\0\0\x80",
)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How many mutated images were decoded to pixels, refused as unreadable, and anything else, which must be none."""

  decoded: int
  refused: int
  other: tuple[str, ...]


def originals() -> list[bytes]:
  """Images in the formats and with the features that have readers of their own."""
  exif = Image.Exif()
  exif[0x0112] = 6
  frames = [Image.new("RGB", (48, 32), colour) for colour in ("red", "green", "blue")]
  animated = {"save_all": True, "append_images": frames}
  return [
    small("JPEG"),
    small("JPEG", progressive=True, exif=exif),
    small("JPEG", "CMYK"),
    small("JPEG", "L", exif=exif),
    small("PNG", exif=exif),
    small("PNG", "P", transparency=b"\0\x80"),
    small("PNG", "I;16"),
    small("GIF", "P", **animated),
    small("WEBP", exif=exif),
    small("WEBP", "RGBA", lossless=True),
    small("WEBP", **animated),
    small("BMP"),
    small("BMP", "P"),
    *(small("TIFF", compression=compression) for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
    small("TIFF", "1", compression="group4", exif=exif),
    small("TIFF", "I;16", **{"save_all": True, "append_images": [Image.new("I;16", (48, 32))]}),
    small("AVIF", exif=exif),
    small("JPEG2000"),
    small("PPM"),
  ]


def mutated(images: list[bytes], mutations: int, seed: int) -> Iterator[bytes]:
  """Yields so many images, each with one to eight mutations."""
  rng = random.Random(seed)
  for _ in range(mutations):
    data = bytearray(rng.choice(images))
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
      _mutate(data, rng, images)
    yield bytes(data)


def _mutate(data: bytearray, rng: random.Random, images: list[bytes]) -> None:
  """Changes bits, bytes, numbers or parts of `data`; half of the time near its begin, where headers are."""
  at = rng.randrange(max(1, min(len(data), 200) if rng.random() < 0.5 else len(data)))
  length = rng.randrange(1, 64)
  match rng.randrange(8):
    case 0 | 1:
      data[at : at + 1] = bytes([rng.randrange(256)])
    case 2:
      data[at : at + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1])
    case 3:
      value = rng.choice(_INTERESTING)
      data[at : at + len(value)] = value
    case 4:
      data[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.randrange(1 << rng.choice((4, 8, 16, 24, 32))))
    case 5:
      del data[at : at + length if rng.random() < 0.7 else len(data)]
    case 6:
      data[at:at] = data[at : at + length]
    case 7:
      other = rng.choice(images)
      start = rng.randrange(len(other))
      data[at : at + length] = other[start : start + length]


def fuzz(mutations: int, seed: int = 0) -> Outcome:
  """Decodes so many mutated images with the rules of a folder: each must give pixels, or be refused as unreadable."""
  rules = decode.Rules(formats=FORMATS, max_pixels=1 << 22, upright=True)
  decoded, refused, other = 0, 0, []
  for data in mutated(originals(), mutations, seed):
    try:
      image = decode.pixels(data, rules)
    except UnreadableImage as error:
      refused += 1
      if "\n" in str(error) or not str(error):
        other.append(f"no line: {error!r}")
      continue
    except BaseException as error:  # what this is a test for
      other.append(repr(error))
      continue
    decoded += 1
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size or not image.flags.c_contiguous:
      other.append(f"{image.dtype} {image.shape}")
  return Outcome(decoded, refused, tuple(other))
