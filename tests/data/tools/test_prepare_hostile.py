"""What comes of unusual images when a folder is prepared as a TFDS dataset."""

import dataclasses

import numpy as np
from PIL import Image

from nfnets.config import DataConfig
from nfnets.data.sources.open import open_source
from nfnets.data.tools.prepare import Preparation
from tests.data.images import hostile


def prepared(tmp_path, data: bytes, short_side: int):
  """Prepares a folder of one image: (its pixels in the folder, those in the new dataset)."""
  (tmp_path / "train/ant").mkdir(parents=True)
  (tmp_path / "train/ant/a.jpg").write_bytes(data)
  config = DataConfig(name="folder", dir=str(tmp_path), test_split="train", index_dir=str(tmp_path / "index"))
  preparation = Preparation(config, str(tmp_path / "out"), short_side=short_side)
  preparation.run()
  preparation.close()
  pixels = []
  for opened in (config, dataclasses.replace(config, name="folder_prepared", dir=str(tmp_path / "out"))):
    source = open_source(opened, "train")
    pixels.append(source.pixels(0, source[0]))
    source.close()
  return pixels


def test_an_image_that_exif_turns_is_stored_upright(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  before, after = prepared(tmp_path, hostile.small("JPEG", exif=exif), short_side=64)  # small enough to keep its bytes
  assert before.shape == (48, 32, 3)
  np.testing.assert_array_equal(after, before)


def test_an_image_too_long_for_a_jpeg_is_stored_as_a_png(tmp_path):
  data = hostile.png(80_000, 8, bits=16)
  before, after = prepared(tmp_path, data, short_side=7)
  assert before.shape == (8, 80_000, 3) and after.shape == (7, 70_000, 3)
