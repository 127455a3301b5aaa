"""Every format and kind of pixels becomes the first picture of its file, in three channels of eight bits, upright where asked."""

import io

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from nfnets.config import DataConfig
from nfnets.data.errors import UnreadableImage
from nfnets.data.images import decode
from nfnets.errors import UserError
from tests.data.images.hostile import small

RED, GREEN = (254, 0, 0), (0, 128, 0)


def saved(image: Image.Image, format: str, **options) -> bytes:
  out = io.BytesIO()
  image.save(out, format, **options)
  return out.getvalue()


# ---- formats


def test_the_defaults_are_the_configurations():
  assert decode.Rules() == decode.Rules(formats=DataConfig().formats, max_pixels=DataConfig().max_pixels)


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_formats_without_loss_keep_every_pixel(format):
  image = Image.open(io.BytesIO(small("PNG"))).quantize(64).convert("RGB")
  options = {"lossless": True} if format == "WEBP" else {}
  np.testing.assert_array_equal(decode.pixels(saved(image, format, **options)), np.asarray(image))


def test_an_eps_starts_no_ghostscript(monkeypatch, tmp_path):
  """Pillow would start the first program called gs, whatever the file is called."""
  program, started = tmp_path / "gs", tmp_path / "started"
  program.write_text(f"#!/bin/sh\ntouch {started}\n")
  program.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
  monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
  data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
  with pytest.raises(UnreadableImage, match="not an image"):
    decode.pixels(data)
  assert not started.exists()


def test_other_formats_are_read_when_the_configuration_names_them():
  data = small("PPM")
  with pytest.raises(UnreadableImage, match="not an image"):
    decode.pixels(data)
  np.testing.assert_array_equal(decode.pixels(data, decode.Rules(formats=("PPM",))), decode.pixels(small("PNG")))
  with pytest.raises(UnreadableImage, match="not an image"):
    decode.pixels(small("JPEG"), decode.Rules(formats=("PNG",)))


@pytest.mark.parametrize("formats", [(), ("EPS",), ("jpeg",), "JPEG", ("JPEG", 3), None])
def test_formats_that_the_configuration_refuses(formats):
  with pytest.raises(UserError, match=r"DataConfig.formats = .*: expected a tuple of one or more of 'JPEG'"):
    DataConfig(formats=formats).validate()


@pytest.mark.parametrize("pixels", [0, -1, 1e6, None, 10**9])
def test_max_pixels_that_the_configuration_refuses(pixels):
  with pytest.raises(UserError, match=r"DataConfig.max_pixels = .*: expected a whole number in \[1, 178,956,971\)"):
    DataConfig(max_pixels=pixels).validate()


# ---- kinds of pixels


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_several_pictures_the_first_is_taken(format):
  first, second = (Image.new("RGB", (6, 4), colour) for colour in (RED, GREEN))
  options = {"lossless": True} if format == "WEBP" else {}
  data = saved(first, format, save_all=True, append_images=[second], **options)
  np.testing.assert_array_equal(decode.pixels(data), np.broadcast_to(np.uint8(RED), (4, 6, 3)))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_of_sixteen_bits_the_upper_eight_are_kept(format):
  values = np.array([[0, 255, 256, 0x1234, 0xFFFF]], np.uint16)
  expected = np.repeat(np.uint8([[0, 0, 1, 0x12, 0xFF]])[..., None], 3, axis=-1)
  np.testing.assert_array_equal(decode.pixels(saved(Image.fromarray(values), format)), expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["P", "LA", "RGBA"])
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_transparency_is_dropped_and_colours_stay(mode, format):
  image = Image.new("RGBA", (4, 3), (*RED, 7)).convert(mode)
  options = {"lossless": True, "exact": True} if format == "WEBP" else {"transparency": b"\0" * 9} if mode == "P" else {}
  expected = np.asarray(Image.new("RGB", (4, 3), RED).convert(mode[0] if mode == "LA" else "RGB").convert("RGB"))
  np.testing.assert_array_equal(decode.pixels(saved(image, format, **options)), expected)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_is_converted(format):
  image = Image.new("CMYK", (16, 16), (0, 200, 100, 30))
  expected = np.asarray(image.convert("RGB")).astype(int)
  assert np.abs(decode.pixels(saved(image, format)).astype(int) - expected).max() <= 2


# ---- EXIF orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format, mode", [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "I;16"), ("WEBP", "RGB")])
def test_images_are_turned_as_pillow_turns_them(format, mode, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = small(format, mode, exif=exif)
  stored, upright = decode.pixels(data), decode.pixels(data, decode.Rules(upright=True))
  with Image.open(io.BytesIO(data)) as image:
    places = np.arange(image.width * image.height, dtype=np.int32).reshape(image.height, image.width)
    numbers = Image.fromarray(places)
    numbers.info["exif"] = image.getexif().tobytes()
    expected = stored.reshape(-1, 3)[np.asarray(ImageOps.exif_transpose(numbers))]
  np.testing.assert_array_equal(upright, expected)
  assert upright.flags.c_contiguous and (orientation == 1) == np.array_equal(upright, stored)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_upright_always(orientation):
  data = small("TIFF", tiffinfo={0x0112: orientation})
  with Image.open(io.BytesIO(data)) as image:
    expected = np.asarray(ImageOps.exif_transpose(image))
  for upright in (False, True):
    np.testing.assert_array_equal(decode.pixels(data, decode.Rules(upright=upright)), expected)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_changes_nothing(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = small("JPEG", exif=exif)
  np.testing.assert_array_equal(decode.pixels(data, decode.Rules(upright=True)), decode.pixels(data))


def test_damaged_exif_data_change_nothing():
  for exif in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
    data = small("JPEG", exif=exif)
    np.testing.assert_array_equal(decode.pixels(data, decode.Rules(upright=True)), decode.pixels(data))


def test_the_orientation_in_xmp_counts_as_pillow_counts_it():
  xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
  data = small("JPEG", xmp=xmp)
  with Image.open(io.BytesIO(data)) as image:
    expected = np.asarray(ImageOps.exif_transpose(image))
  assert expected.shape == (48, 32, 3)
  np.testing.assert_array_equal(decode.pixels(data, decode.Rules(upright=True)), expected)
