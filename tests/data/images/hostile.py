"""Images that take more than their size warrants: each small function returns the bytes of one."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def small(format: str, mode: str = "RGB", **options) -> bytes:
  """An ordinary image of 48×32 pixels: a gradient with some noise."""
  grey = np.add.outer(np.arange(32), np.arange(48)) * 3
  noise = np.random.default_rng(0).integers(0, 9, (32, 48, 3))
  pixels = (grey[..., None] + noise).astype(np.uint8)
  image = Image.fromarray(pixels[..., 0] * np.uint16(256)) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
  out = io.BytesIO()
  image.save(out, format, **options)
  return out.getvalue()


def jpeg_that_claims(width: int, height: int, **options) -> bytes:
  """A JPEG of a few hundred bytes with other sizes in its header."""
  data = small("JPEG", **options)
  at = data.index(b"\xff\xc2" if options.get("progressive") else b"\xff\xc0") + 5
  return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def plain_jpeg(side: int, mode: str = "RGB", **options) -> bytes:
  """A JPEG of one colour."""
  out = io.BytesIO()
  Image.new("RGB", (side, side), (120, 130, 140)).convert(mode).save(out, "JPEG", **options)
  return out.getvalue()


def jpeg_of_scans(scans: int, side: int = 2048, mode: str = "RGB") -> bytes:
  """A progressive JPEG whose last scan stands there many times: each is a pass over all its pixels."""
  data = plain_jpeg(side, mode, progressive=True)
  last = data.rindex(b"\xff\xda")
  # The last scan refines one component; the same one is read again and again.
  return data[:-2] + data[last:-2] * scans + data[-2:]


def png_chunk(kind: bytes, content: bytes) -> bytes:
  return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *, rows: int | None = None, bits: int = 1, extra: bytes = b"") -> bytes:
  """A black PNG; rows: how many are there, all by default. extra: chunks before the pixels."""
  packer = zlib.compressobj(9)
  row = bytes(1 + (width * bits + 7) // 8)
  content = b"".join(packer.compress(row) for _ in range(height if rows is None else rows)) + packer.flush()
  header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
  return b"\x89PNG\r\n\x1a\n" + header + extra + png_chunk(b"IDAT", content) + png_chunk(b"IEND", b"")


def png_text(size: int) -> bytes:
  """A chunk of compressed text."""
  packer = zlib.compressobj(9)
  content = b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()
  return png_chunk(b"zTXt", b"Comment\0\0" + content)


def tiff(tags: dict[int, list[int]], content: bytes) -> bytes:
  """A TIFF whose tags are 32-bit numbers. Content begins at byte 8; the tags follow it."""
  entries, values = b"", b""
  begin = 8 + len(content)
  after = begin + 2 + 12 * len(tags) + 4
  for tag, numbers in sorted(tags.items()):
    packed = struct.pack(f"<{len(numbers)}I", *numbers)
    entries += struct.pack("<HHI", tag, 4, len(numbers))
    entries += packed if len(numbers) == 1 else struct.pack("<I", after + len(values))
    values += packed if len(numbers) > 1 else b""
  return b"II*\0" + struct.pack("<I", begin) + content + struct.pack("<H", len(tags)) + entries + bytes(4) + values


def tiff_tags(width: int, height: int, compression: int) -> dict[int, list[int]]:
  """Tags of a grey TIFF of 8 bits."""
  return {256: [width], 257: [height], 258: [8], 259: [compression], 262: [1], 277: [1]}


def tiff_of_a_jpeg(scans: int, side: int = 1024) -> bytes:
  """A grey TIFF whose only strip is a progressive JPEG of many scans."""
  content = jpeg_of_scans(scans, side, "L")
  return tiff(tiff_tags(side, side, 7) | {278: [side], 273: [8], 279: [len(content)]}, content)


def tiff_of_one_tile(side: int) -> bytes:
  """An image of 64×64 pixels in one tile that is far larger."""
  content = zlib.compress(bytes(1 << 20))
  return tiff(tiff_tags(64, 64, 8) | {322: [side], 323: [side], 324: [8], 325: [len(content)]}, content)


def tiff_bomb(side: int) -> bytes:
  """A black image in one strip."""
  packer = zlib.compressobj(9)
  content = b"".join(packer.compress(bytes(side)) for _ in range(side)) + packer.flush()
  return tiff(tiff_tags(side, side, 8) | {278: [side], 273: [8], 279: [len(content)]}, content)


def gif_that_claims(width: int, height: int) -> bytes:
  """A GIF with another screen."""
  data = small("GIF", "P")
  return data[:6] + struct.pack("<HH", width, height) + data[10:]


def bmp_that_claims(width: int, height: int) -> bytes:
  """A BMP with other sizes in its header."""
  data = small("BMP")
  return data[:18] + struct.pack("<ii", width, height) + data[26:]


def webp_that_claims(width: int, height: int) -> bytes:
  """An extended WebP with another canvas."""
  data = small("WEBP", lossless=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0")
  at = data.index(b"VP8X") + 12
  return data[:at] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + data[at + 6 :]


def webp(side: int) -> bytes:
  """A black image without loss."""
  out = io.BytesIO()
  Image.new("RGB", (side, side)).save(out, "WEBP", lossless=True, method=0)
  return out.getvalue()
