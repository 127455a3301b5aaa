"""Pixels and crops are TensorFlow's (tests/golden/README.md), and bytes that are no image are refused."""

import io
import math
import pathlib

import numpy as np
import pytest
from PIL import Image

from nfnets.data.images import decode

GOLDEN = np.load(pathlib.Path(__file__).parents[2] / "golden" / "decode.npz")
FILES = sorted(name.removeprefix("file_") for name in GOLDEN.files if name.startswith("file_"))


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_tensorflows(name):
  """JPEG (baseline, progressive, grey, EXIF orientation ignored) and PNG are equal, CMYK is within one grey level."""
  pixels, expected = decode.pixels(GOLDEN[f"file_{name}"].tobytes()), GOLDEN[f"pixels_{name}"]
  assert pixels.dtype == np.uint8 and pixels.shape == expected.shape
  assert np.abs(pixels.astype(int) - expected).max() <= (1 if name == "cmyk" else 0)


@pytest.mark.parametrize("name", ["squash", "crop"])
def test_evaluation_crops_are_tensorflows_rounded(name):
  crop = decode.test_image(GOLDEN["pixels_plain"], 32, crop=name)
  expected = GOLDEN[f"{name}_32"] / 8  # stored in eighths
  assert np.abs(crop - np.clip(expected, 0, 255)).max() <= 0.5 + 1 / 16


def test_short_side_only_crops_an_image_that_needs_no_resizing():
  image = GOLDEN["pixels_plain"]  # 80×120
  np.testing.assert_array_equal(decode.test_image(image, 70, crop="short_side"), image[5:75, 25:95])
  assert decode.test_image(image, 33, crop="short_side").shape == (33, 33, 3)


@pytest.mark.parametrize("size, share", [(256, 0.9), (288, 0.94), (160, 0.95), (64, 1.0), (33, 0.951)])
@pytest.mark.parametrize("crop", ["squash", "short_side"])
def test_timms_protocol_gives_what_pillow_gives(crop, size, share):
  """As timm's evaluation: Resize(floor(size / crop_pct)) and CenterCrop(size) of torchvision, on a Pillow image."""
  image = np.random.default_rng(0).integers(0, 256, (201, 333, 3), np.uint8)
  short = math.floor(size / share)
  resized = (short, short) if crop == "squash" else (int(short * 333 / 201), short)  # width, height
  left, top = (int(round((side - size) / 2.0)) for side in resized)
  whole = Image.fromarray(image).resize(resized, Image.Resampling.BICUBIC)
  ours = decode.test_image(image, size, crop=crop, crop_pct=share, resize="pillow")
  np.testing.assert_array_equal(ours, np.asarray(whole.crop((left, top, left + size, top + size))))


def test_the_square_alone_is_that_of_the_whole(monkeypatch):
  """Of an image that would be resized to millions of pixels Pillow makes the square alone, whose place it knows in float32."""
  image = np.random.default_rng(0).integers(0, 256, (40, 700, 3), np.uint8)
  whole = decode.test_image(image, 64, crop="short_side", resize="pillow")
  monkeypatch.setattr(decode, "_RESIZED_WHOLE", 0)
  square = decode.test_image(image, 64, crop="short_side", resize="pillow")
  assert np.abs(square - whole.astype(int)).max() <= 1


def test_a_share_cuts_it_out_of_the_shorter_side():
  image = GOLDEN["pixels_plain"]
  cut = decode.test_image(image, 40, crop="crop", crop_pct=0.5)
  np.testing.assert_array_equal(cut, image[20:60, 40:80])


@pytest.mark.parametrize("height, width", [(375, 500), (300, 900)])
def test_training_crops_are_distributed_as_tensorflows(height, width):
  """Compares the deciles of area, aspect, top, left and height of 20,000 boxes."""
  rng = np.random.default_rng(0)
  boxes = np.array([decode.inception_box(height, width, 192, rng, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(20_000)])
  top, left, h, w = boxes.T
  assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
  deciles = np.quantile(np.stack([h * w / (height * width), w / h, top, left, h], axis=1), np.linspace(0, 1, 11), axis=0)
  expected = GOLDEN[f"boxes_{height}x{width}"]
  assert (np.abs(deciles - expected)[1:-1] <= 0.03 * np.ptp(expected, axis=0)).all()


def test_impossible_crops_fall_back_to_the_centre():
  rng = np.random.default_rng(0)
  assert decode.inception_box(1000, 10, 64, rng, (0.5, 1.0), (1.0, 1.0)) == decode.centre_box(1000, 10, 64)
  assert decode.inception_box(1, 1, 64, rng, (0.08, 1.0), (3 / 4, 4 / 3))[2:] == (1, 1)


def test_a_crop_of_the_right_size_is_not_resized():
  image = GOLDEN["pixels_plain"]
  out = np.zeros((20, 20, 3), np.uint8)
  decode.crop_and_resize(image, (3, 4, 20, 20), out)
  np.testing.assert_array_equal(out, image[3:23, 4:24])


def test_shifted_images_move_and_repeat_their_edge():
  image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
  moved = decode.shift(image, 1, -2)
  np.testing.assert_array_equal(moved[1:, :3], image[:-1, 2:])
  np.testing.assert_array_equal(moved[0, :3], image[0, 2:])
  np.testing.assert_array_equal(moved[1:, 4], image[:-1, 4])


def jpeg(**options) -> bytes:
  out = io.BytesIO()
  Image.fromarray(GOLDEN["pixels_plain"]).save(out, "JPEG", **options)
  return out.getvalue()


@pytest.mark.parametrize(
  "data, message",
  [
    (b"", "no bytes"),
    (b"hello, world", "not an image"),
    (jpeg()[: len(jpeg()) // 2], "truncated"),
    (jpeg()[:10], "."),
    (GOLDEN["file_png"].tobytes()[:200], "."),
    (b"\xff\xd8\xff" + bytes(500), "."),
  ],
)
def test_bytes_that_are_no_image_are_refused_with_the_reason(data, message):
  with pytest.raises(decode.UnreadableImage, match=message):
    decode.pixels(data)


def test_a_jpeg_with_extra_bytes_before_its_end_marker_is_read():
  """ImageNet has JPEGs with bytes between their data and their end marker; TensorFlow reads them."""
  data = jpeg()
  longer = data[:-2] + b"\x12\x34\x56" + data[-2:]
  assert np.abs(decode.pixels(longer).astype(int) - decode.pixels(data)).max() <= 1
