"""Mutated images are decoded or refused; nothing else happens. The long form is a row of python -m tests.faults."""

import io

import pytest
from PIL import Image

from nfnets.data.errors import UnreadableImage
from nfnets.data.images import decode
from tests.data.images import fuzz


@pytest.mark.filterwarnings("ignore::UserWarning")  # with which Pillow tells of damaged tags
def test_mutated_images_are_decoded_or_refused():
  outcome = fuzz.fuzz(6000)
  assert outcome.other == ()
  assert outcome.decoded > 1000 and outcome.refused > 1000  # the mutations are neither harmless nor all fatal


@pytest.mark.parametrize("error", [RuntimeError("Failed to decode"), NotImplementedError(), MemoryError(), RecursionError()])
def test_whatever_a_decoder_raises_makes_the_image_unreadable(monkeypatch, error):
  def fails(*_):
    raise error

  data = io.BytesIO()
  Image.new("RGB", (9, 9)).save(data, "PNG")
  monkeypatch.setattr(Image.Image, "convert", fails)
  monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fails)
  with pytest.raises(UnreadableImage, match=str(error) or type(error).__name__):
    decode.pixels(data.getvalue())
