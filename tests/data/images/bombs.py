"""Shows what decoding images that claim too much takes: python -m tests.data.images.bombs [--json]

Each is decoded in a process of its own, whose memory is limited to 4 GiB more than it has.
"""

import json
import multiprocessing
import pathlib
import resource
import sys
import time

from nfnets.data.errors import UnreadableImage
from nfnets.data.images import decode
from tests.data.images import hostile

BOMBS = {
  "JPEG of 747 bytes that claims 65,500²": lambda: hostile.jpeg_that_claims(65500, 65500),
  "the same, progressive": lambda: hostile.jpeg_that_claims(65500, 65500, progressive=True),
  "JPEG of 747 bytes that claims 20,000²": lambda: hostile.jpeg_that_claims(20000, 20000),
  "JPEG of 747 bytes that claims 12,000²": lambda: hostile.jpeg_that_claims(12000, 12000),
  "progressive JPEG of 606 bytes that claims 8,000²": lambda: hostile.jpeg_that_claims(8000, 8000, progressive=True),
  "progressive JPEG of 3,010 scans, 2,048²": lambda: hostile.jpeg_of_scans(3000),
  "PNG, 13,000² black": lambda: hostile.png(13000, 13000),
  "PNG, 8,192² black, 16 bits": lambda: hostile.png(8192, 8192, bits=16),
  "PNG, 67,108,864×1 black": lambda: hostile.png(1 << 26, 1),
  "PNG with 256 MB of text in 261 kB": lambda: hostile.png(8, 8, extra=hostile.png_text(1 << 28)),
  "TIFF of a JPEG of 3,006 scans, 1,024²": lambda: hostile.tiff_of_a_jpeg(3000),
  "TIFF, 64² in a tile of 65,488²": lambda: hostile.tiff_of_one_tile(65488),
  "TIFF, 64² in a tile of 8,192²": lambda: hostile.tiff_of_one_tile(8192),
  "TIFF, 13,000² black": lambda: hostile.tiff_bomb(13000),
  "GIF that claims 65,535²": lambda: hostile.gif_that_claims(65535, 65535),
  "GIF that claims 8,192²": lambda: hostile.gif_that_claims(8192, 8192),
  "BMP that claims 60,000²": lambda: hostile.bmp_that_claims(60000, 60000),
  "WebP that claims 16,777,216×200": lambda: hostile.webp_that_claims(1 << 24, 200),
  "WebP, 8,192² black in 34 bytes": lambda: hostile.webp(8192),
}


def _memory(key: str) -> int:
  """Returns a figure of this process's memory in MB: VmRSS is what it has, VmHWM the most that it had."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith(key)) // 1024


def _decode(data: bytes, results) -> None:
  for format in decode.Rules().formats:
    decode.pixels(hostile.small(format))  # so that Pillow's modules are not counted
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
  before, size = _memory("VmRSS"), _memory("VmSize")
  resource.setrlimit(resource.RLIMIT_AS, ((size + 4096) << 20,) * 2)
  start, error = time.perf_counter(), ""
  try:
    decode.pixels(data)
  except UnreadableImage as refused:
    error = str(refused)
  results.put({"refused": error, "seconds": time.perf_counter() - start, "megabytes": _memory("VmHWM") - before})


def measure(data: bytes) -> dict:
  """Decodes in a process of its own: {"refused": why, or "" where it was decoded, "seconds", "megabytes"}."""
  context = multiprocessing.get_context("fork")
  results = context.Queue()
  process = context.Process(target=_decode, args=(data, results))
  process.start()
  process.join(60)
  if process.exitcode != 0:
    process.kill()
    return {"refused": "", "seconds": 0.0, "megabytes": 0, "died": process.exitcode}
  return results.get()


if __name__ == "__main__":
  figures = {name: {"bytes": len(data := make()), **measure(data)} for name, make in BOMBS.items()}
  if "--json" in sys.argv:
    print(json.dumps(figures))
  else:
    for name, figure in figures.items():
      print(f"{name}: {figure['bytes']:,} bytes; {figure['megabytes']} MB, {figure['seconds']:.2f} s; {figure['refused']}")
