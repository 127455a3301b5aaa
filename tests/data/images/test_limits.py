"""Images that would take more memory or time than their size warrants are refused before they take it (docs/security.md)."""

import json
import pathlib
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from nfnets.data.errors import UnreadableImage
from nfnets.data.images import decode, limits
from tests.data.images import bombs, hostile


@pytest.fixture(scope="module")
def figures():
  """What decoding each bomb took, in a process of its own."""
  root = pathlib.Path(__file__).resolve().parents[3]
  command = [sys.executable, "-m", "tests.data.images.bombs", "--json"]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.mark.parametrize("name", bombs.BOMBS)
def test_bombs_are_refused_at_once(figures, name):
  figure = figures[name]
  assert figure["refused"], figure
  assert figure["megabytes"] < 100 and figure["seconds"] < 1, figure


def test_the_limit_is_the_configurations():
  data = hostile.small("JPEG")
  assert decode.pixels(data, decode.Rules(max_pixels=48 * 32)).shape == (32, 48, 3)
  for format in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
    with pytest.raises(UnreadableImage, match="48×32 pixels are more than config.data.max_pixels=1,535 allows"):
      decode.pixels(hostile.small(format), decode.Rules(max_pixels=48 * 32 - 1))


def test_the_smallest_jpegs_there_are_hold_their_pixels():
  """An image of one colour, optimized and progressive, takes the fewest bytes."""
  for mode in ("L", "RGB"):
    data = hostile.plain_jpeg(2048, mode, progressive=True, optimize=True)
    assert decode.pixels(data).shape == (2048, 2048, 3)
    assert 2048 * 2048 / len(data) > limits.PIXELS_PER_BYTE / 4  # the limit is near, and rightly so


def test_a_progressive_jpeg_of_many_scans_is_read():
  data = hostile.jpeg_of_scans(50, side=64)
  np.testing.assert_array_equal(decode.pixels(data), decode.pixels(hostile.jpeg_of_scans(0, side=64)))


def test_scans_are_counted_only_where_a_decoder_reads_them_all():
  baseline, progressive = hostile.small("JPEG"), hostile.small("JPEG", progressive=True)
  assert limits.jpeg_header(baseline) == (False, baseline.rindex(b"\xff\xda"))
  assert limits.jpeg_header(progressive) == (True, progressive.index(b"\xff\xda"))
  thumbnail = b"Exif\0\0" + baseline  # the markers of a picture within EXIF are none of the image's
  data = hostile.small("JPEG", exif=thumbnail)
  assert limits.jpeg_header(data) == (False, data.rindex(b"\xff\xda"))
  many_comments = b"\xff\xd8" + b"\xff\xfe\0\2" * 2000 + baseline[2:]
  for damaged in (b"\xff\xd8\xff", baseline[:100], many_comments, b"\xff\xd8\xff\xfe\0\0" * 9):
    assert limits.jpeg_header(damaged) == (True, len(damaged))


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (5, 3000), (2100, 900)])
def test_extreme_shapes_are_cropped_as_any_other(shape):
  """The reference computes with the whole image."""
  image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  reference = np.asarray(image, np.float32)
  for axis in (0, 1):
    _, positions, weights = decode._taps(shape[axis], 96, 16, 64, 1 << 30)
    taps = np.take(reference, positions, axis=axis)  # [64, 4, …] along the axis
    weights = np.expand_dims(weights, tuple(range(axis)) + tuple(range(axis + 2, 4)))
    terms = np.moveaxis(taps * weights, axis + 1, 0)
    reference = ((terms[0] + terms[1]) + terms[2]) + terms[3]
  np.testing.assert_array_equal(decode.bicubic(image, (96, 96), (16, 16), 64), np.clip(reference + 0.5, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("resize", ["tensorflow", "pillow"])
@pytest.mark.parametrize("shape", [(1, 1 << 25), (1 << 25, 1)])
def test_crops_of_extreme_shapes_take_memory_for_their_result(shape, resize):
  shape = tuple(min(side, 1 << 22) for side in shape) if resize == "pillow" else shape  # it filters each of the pixels
  image = np.zeros((*shape, 3), np.uint8)
  for crop in ("squash", "crop", "short_side"):
    tracemalloc.start()
    assert decode.test_image(image, 64, crop=crop, resize=resize).shape == (64, 64, 3)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20  # the rows of all columns would be 26 GB
    tracemalloc.stop()
