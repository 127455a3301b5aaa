"""Refuses images that would take more memory or time than their size warrants, from their headers and before they are decoded."""

from typing import Any, NamedTuple

import simplejpeg

from nfnets.data.errors import UnreadableImage

# A progressive JPEG as encoders write it has about ten scans, and optimizers make twenty of them. Each is a pass over the whole
# image, so that a hundred are allowed where all of them together pass over no more than 2^28 pixels (half a second).
LEAST_SCANS, MOST_SCANS, SCANNED_PIXELS = 20, 100, 1 << 28
# A JPEG spends at least one bit on each block of 8×8 pixels: one that claims more pixels for its bytes is not all there. Other
# formats can say "all black" in fewer bytes, which is allowed up to four million pixels: larger ones are no photographs.
PIXELS_PER_BYTE = 8 * 64
PIXELS_FOR_NOTHING = 1 << 22
START_OF_SCAN = b"\xff\xda"
_MAX_MARKERS = 1000  # that are looked at before the first scan; an ICC profile and EXIF take some dozens at most
_SEQUENTIAL, _FRAMES = (0xC0, 0xC1), (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_TILE_SIDES = (322, 323)  # tags of TIFF 6.0


def check_size(width: int, height: int, max_pixels: int) -> None:
  """Raises UnreadableImage when an image of so many pixels must not be decoded."""
  if width * height > max_pixels:
    raise UnreadableImage(f"{width:,}×{height:,} pixels are more than config.data.max_pixels={max_pixels:,} allows")


def check_bytes(size: int, width: int, height: int, allowance: int = PIXELS_FOR_NOTHING) -> None:
  """Raises UnreadableImage when a file of `size` bytes claims too many pixels. allowance: how many it may have in any case."""
  if width * height > max(allowance, PIXELS_PER_BYTE * size):
    raise UnreadableImage(f"truncated, or no photograph: {size:,} bytes for the {width:,}×{height:,} pixels of its header")


def check_jpeg(data: bytes, max_pixels: int) -> None:
  """Reads the header of a JPEG that libjpeg-turbo is to decode.

  Raises:
    UnreadableImage: it has too many pixels, too many for its bytes, or too many scans.
    ValueError: libjpeg-turbo cannot read the header.
  """
  height, width = map(int, simplejpeg.decode_jpeg_header(data)[:2])
  check_size(width, height, max_pixels)
  check_jpeg_bytes(data, width, height)


def check_jpeg_bytes(data: bytes, width: int, height: int) -> None:
  """Raises UnreadableImage when a JPEG of this size has too few bytes to be whole, or too many scans."""
  check_bytes(len(data), width, height, allowance=0)
  if not jpeg_header(data).many_scans:
    return
  scans = data.count(START_OF_SCAN)  # within a scan's own bytes the marker does not occur
  most = max(LEAST_SCANS, min(MOST_SCANS, SCANNED_PIXELS // (width * height)))
  if scans > most:
    raise UnreadableImage(f"{scans:,} scans are more than the {most:,} that an image of its size is decoded with")


class JpegHeader(NamedTuple):
  """many_scans: whether a decoder looks for more than one scan; end: where the first scan begins, in bytes."""

  many_scans: bool
  end: int


def jpeg_header(data: bytes) -> JpegHeader:
  """Walks the markers of a JPEG up to its first scan (ITU T.81, annex B); of one that is unusual, it assumes the worst.

  This takes microseconds. To count the markers of all scans would take a tenth as long as to decode a baseline JPEG, of which
  decoders read one scan and no more, if that has all components.
  """
  at, frame, components = 2, 0, 0
  try:
    for _ in range(_MAX_MARKERS):
      marker = data[at + 1]
      if data[at] != 0xFF or marker < 0xC0:
        break
      if marker == 0xDA:
        return JpegHeader(frame not in _SEQUENTIAL or data[at + 4] != components, at)
      if marker in _FRAMES:
        frame, components = marker, data[at + 9]
      at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
  except IndexError:
    pass
  return JpegHeader(True, len(data))


def check_tiff(data: bytes, image: Any, max_pixels: int) -> None:
  """Raises UnreadableImage when the tiles of an open TIFF are too large: libtiff makes room for a whole one.

  The scans of JPEGs within a TIFF are limited by libtiff itself, to a hundred.

  Args:
    data: the bytes of the file.
    image: PIL's TiffImageFile of them, of which nothing but the tags has been read.
    max_pixels: the most pixels of a tile.
  """
  width, height = (int(image.tag_v2.get(tag, 0)) for tag in _TILE_SIDES)
  check_size(width, height, max_pixels)
  check_bytes(len(data), width, height)
