"""A folder of one's own photographs: what a slice of it is."""

import collections
import itertools
import os

import pytest

from nfnets.config import DataConfig
from nfnets.data.errors import DataError
from nfnets.data.sources.open import open_source
from nfnets.data.tools.prepare import Preparation
from tests.data.images import hostile

CLASSES = {"ant": 40, "bee": 20, "cow": 10, "dog": 5}


def make(top, counts=CLASSES, data=b""):
  """Makes class folders with so many images each below `top`."""
  for name, count in counts.items():
    (top / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
      (top / name / f"{number:03}.jpg").write_bytes(data)


def load(top, split="train", progress=lambda line: None, **fields):
  return open_source(DataConfig(name="folder", dir=str(top), train_split=split, **fields), split, progress=progress)


def files(source):
  return [source.address(i) for i in range(len(source))]


def counts(source):
  found = collections.Counter(source.class_names[source[i].label] for i in range(len(source)))
  return [found[name] for name in source.class_names]


# ---- slices


@pytest.fixture
def folder(tmp_path):
  make(tmp_path / "train")
  return tmp_path


@pytest.mark.parametrize("percent", [20, 40, 50, 80])
def test_both_sides_of_a_percentage_have_every_class_in_proportion(folder, percent):
  train, test = load(folder, f"train[:{percent}%]"), load(folder, f"train[{percent}%:]")
  for found, share in ((train, percent / 100), (test, 1 - percent / 100)):
    assert all(abs(count - share * of_class) <= 1 for count, of_class in zip(counts(found), CLASSES.values(), strict=True))
    assert min(counts(found)) > 0
  assert sorted(files(train) + files(test)) == sorted(files(load(folder)))


def test_every_stretch_is_in_proportion(folder):
  """Not the first or the last images alone: a stretch has a class's share to within an image at either end."""
  for start, stop in itertools.combinations(range(0, 76, 5), 2):
    found = counts(load(folder, f"train[{start}:{stop}]"))
    shares = [of_class * (stop - start) / 75 for of_class in CLASSES.values()]
    assert all(abs(count - share) < 2 for count, share in zip(found, shares, strict=True))


def test_slices_that_share_no_interval_share_no_image(folder):
  limits = [0, 1, 7, 33, 34, 50, 99, 100]
  parts = [files(load(folder, f"train[{start}%:{stop}%]")) for start, stop in itertools.pairwise(limits)]
  together = list(itertools.chain(*parts))
  assert len(together) == len(set(together)) == 75
  assert files(load(folder, "train[:7%]+train[50%:]")) == [*parts[0], *parts[1], *parts[5], *parts[6]]


def test_a_slice_is_the_same_everywhere(tmp_path):
  """It follows from the SHA-256 of CLASS/FILE, as `printf ant/000.jpg | sha256sum` has it, not from a generator of NumPy's."""
  make(tmp_path / "train", {"ant": 4, "bee": 2})
  expected = ["ant/003.jpg", "bee/001.jpg", "ant/001.jpg", "ant/002.jpg", "bee/000.jpg", "ant/000.jpg"]
  parts = files(load(tmp_path, "train[:1]")) + files(load(tmp_path, "train[1:]"))
  assert [os.path.relpath(path, tmp_path / "train") for path in parts] == expected


def test_a_whole_split_keeps_the_order_of_its_names(folder):
  assert files(load(folder)) == sorted(files(load(folder))) == files(load(folder, "train[0%:100%]"))


def test_a_class_that_a_slice_has_nothing_of_is_said(folder):
  lines = []
  load(folder, "train[:50%]", lines.append)
  assert lines == []
  load(folder, "train[:4]", lines.append)
  assert lines == [f"train[:4] of {folder} (4 images) has none of 1 of the 4 classes; the first: dog"]


def test_a_slice_of_the_prepared_folder_has_the_same_images(tmp_path):
  make(tmp_path / "photos/train", {"ant": 6, "bee": 4, "cow": 2}, hostile.small("JPEG"))
  config = DataConfig(name="folder", dir=str(tmp_path / "photos"), train_split="train[:50%]", test_split="train[50%:]")
  job = Preparation(config, str(tmp_path / "out"))
  job.run()
  job.close()
  prepared = DataConfig(name="folder_prepared", dir=str(tmp_path / "out"), index_dir=str(tmp_path / "index"))
  for split in (config.train_split, config.test_split):
    ours, theirs = open_source(config, split), open_source(prepared, split)
    assert [ours[i].label for i in range(6)] == [theirs[i].label for i in range(6)]
    theirs.close()
  settings = tmp_path / "out/folder_prepared/1.0.0/prepared.json"
  settings.write_text(settings.read_text().replace("folder, classes mixed", "folder"))
  with pytest.raises(DataError, match="was made with source=folder, now folder, classes mixed"):
    Preparation(config, str(tmp_path / "out"))
