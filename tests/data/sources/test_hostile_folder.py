"""A folder of images may hold anything: what is no image is skipped and counted, and nothing is waited for."""

import io
import os
import socket

import numpy as np
import pytest
from PIL import Image, ImageOps

from nfnets.config import DataConfig
from nfnets.data.batches.evaluation import EvalBatches
from nfnets.data.batches.training import TrainBatches
from nfnets.data.errors import CorruptRecord, DataError
from nfnets.data.sources.open import open_source
from tests.data.images import hostile


@pytest.fixture
def folder(tmp_path):
  """Two classes, of which the second has an image in each format."""
  for path, data in (
    ("train/ant/a.jpg", hostile.small("JPEG")),
    *((f"train/bee/{name}", hostile.small(format)) for name, format in NAMES.items()),
  ):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_bytes(data)
  return tmp_path


NAMES = {"b.BMP": "BMP", "g.gif": "GIF", "j.jpeg": "JPEG", "p.png": "PNG", "t.tif": "TIFF", "u.TIFF": "TIFF", "w.webp": "WEBP"}


def load(folder, progress=lambda line: None, **fields):
  return open_source(DataConfig(name="folder", dir=str(folder), **fields), "train", progress=progress)


def test_every_format_is_read(folder):
  lines = []
  source = load(folder, lines.append)
  assert [os.path.basename(source.address(i)) for i in range(len(source))] == ["a.jpg", *NAMES]
  assert all(source.pixels(i, source[i]).shape == (32, 48, 3) for i in range(len(source)))
  assert lines == []
  assert len(load(folder, formats=("JPEG", "GIF"))) == 3


def test_what_is_no_regular_file_is_skipped_and_counted(folder, monkeypatch):
  where = folder / "train/ant"
  os.mkfifo(where / "pipe.jpg")
  (where / "folder.jpg").mkdir()
  (where / "dangling.jpg").symlink_to(folder / "nowhere")
  (where / "loop.jpg").symlink_to(where / "loop.jpg")
  (where / "device.jpg").symlink_to("/dev/zero")
  (where / "link.jpg").symlink_to(folder / "train/bee/j.jpeg")
  (where / "notes.txt").write_text("")
  (folder / "train/readme").write_text("")
  with socket.socket(socket.AF_UNIX) as listener:
    monkeypatch.chdir(where)  # the path of a socket may have 108 bytes
    listener.bind("socket.jpg")
  lines = []
  source = load(folder, lines.append)
  assert [os.path.basename(source.address(i)) for i in (0, 1)] == ["a.jpg", "link.jpg"] and len(source) == 9
  assert len(lines) == 1 and lines[0].startswith(f"8 of what is in {folder}/train is skipped")


def test_a_pipe_or_a_device_that_takes_the_place_of_an_image_is_a_corrupt_record(folder):
  source = load(folder)
  (folder / "train/ant/a.jpg").unlink()
  os.mkfifo(folder / "train/ant/a.jpg")
  (folder / "train/bee/b.BMP").unlink()
  (folder / "train/bee/b.BMP").symlink_to("/dev/zero")
  with open(folder / "train/bee/g.gif", "r+b") as stream:
    stream.truncate(1 << 40)
  for index, why in (
    (0, "it is no regular file"),
    (1, "it is no regular file"),
    (2, "it has 1,099,511,627,776 bytes, more than"),
  ):
    with pytest.raises(CorruptRecord, match=f"cannot be read: {why}"):
      source[index]


def test_a_class_without_images_is_named(folder):
  (folder / "train/cow").mkdir()
  for number in range(3):
    (folder / f"train/cow/{number}.psd").write_bytes(b"8BPS")
  with pytest.raises(DataError, match="train/cow has no images: it is empty, or has 3 others than .jpg .jpeg .png .gif .webp"):
    load(folder)


def test_names_that_no_terminal_takes_are_escaped(folder):
  path = os.fsencode(folder) + b"/train/ant/a\n\x1b[2J\xff.jpg"
  with open(path, "wb") as stream:
    stream.write(b"no image")
  source = load(folder)
  with pytest.raises(CorruptRecord, match="not an image") as caught:
    source.pixels(0, source[0])
  assert str(caught.value).isprintable() and str(caught.value).encode()
  os.rename(path, os.fsencode(folder) + b"/train/ant/a\n\xff.txt")
  lines = []
  load(folder, lines.append)
  assert len(lines) == 1 and lines[0].isprintable()


# ---- EXIF orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_batches_are_upright(tmp_path, orientation):
  """Crops are taken of what Pillow's exif_transpose makes of an image, in evaluation and in training."""
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = hostile.small("JPEG", exif=exif)
  with Image.open(io.BytesIO(data)) as image:
    places = Image.fromarray(np.arange(48 * 32, dtype=np.int32).reshape(32, 48))
    places.info["exif"] = image.getexif().tobytes()
  stored = open_source_of(tmp_path / "stored", hostile.small("JPEG"))
  upright = stored.pixels(0, stored[0]).reshape(-1, 3)[np.asarray(ImageOps.exif_transpose(places))]
  reference = io.BytesIO()
  Image.fromarray(upright).save(reference, "PNG")
  for crop in ("squash", "crop", "short_side"):
    config = DataConfig(test_crop=crop, test_image_size=16, train_crop="inception", image_size=16)
    ours, expected = (open_source_of(tmp_path / str(i) / crop, image) for i, image in enumerate((data, reference.getvalue())))
    batches = [EvalBatches(source, config, batch=2) for source in (ours, expected)]
    images = [next(iter(batch))["image"] for batch in batches]
    training = [TrainBatches(source, config, batch=2, seed=0) for source in (ours, expected)]
    np.testing.assert_array_equal(*images)
    np.testing.assert_array_equal(*(batch[3]["image"] for batch in training))
    for opened in (*batches, *training):
      opened.close()


def open_source_of(folder, data: bytes):
  """Opens a folder of one image."""
  (folder / "train/ant").mkdir(parents=True)
  (folder / "train/ant/a.jpg").write_bytes(data)
  return load(folder)
