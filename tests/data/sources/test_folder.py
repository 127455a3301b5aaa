"""A folder of one's own photographs: what a slice of it is, and which of it is for validation."""

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


# ---- folders of classes alone


@pytest.fixture
def plain(tmp_path):
  make(tmp_path / "photos", {"ant": 200, "bee": 100, "cow": 6, "dog": 3, "elk": 2})
  return tmp_path / "photos"


def test_a_folder_of_classes_alone_has_a_validation_share(plain):
  lines = []
  train, held_out = (load(plain, split, lines.append) for split in ("train", "validation"))
  assert set(files(train)).isdisjoint(files(held_out)) and len(train) + len(held_out) == 311
  assert files(train) == sorted(files(train)) and files(held_out) == sorted(files(held_out))
  assert 10 <= counts(held_out)[0] <= 30 and 4 <= counts(held_out)[1] <= 16 and min(counts(held_out)[2:]) >= 1
  assert min(counts(train)) >= 1
  assert (
    lines[0]
    == lines[1]
    == (
      f"no train/ and val/ in {plain}: about 10 % of each class ({len(held_out)} of 311 images) are for validation "
      "(config.data.validation)"
    )
  )
  for split in ("val", "test"):
    assert files(load(plain, split)) == files(held_out)
  half = files(load(plain, "train[:50%]"))
  assert set(half) <= set(files(train)) and len(half) == round(len(train) / 2)


def test_all_is_everything_once(plain, tmp_path):
  assert sorted(files(load(plain, "all"))) == sorted(files(load(plain, "train+val")))
  make(tmp_path / "two", {"ant": 2, "bee": 2})
  (tmp_path / "both").mkdir()
  for name in ("train", "val"):
    (tmp_path / "both" / name).symlink_to(tmp_path / "two")
  assert len(load(tmp_path / "both", "all")) == 8


def test_numbered_classes_are_in_the_order_of_their_numbers(tmp_path):
  """As the folders of ImageNet-V2."""
  make(tmp_path / "numbers", {str(number): 2 for number in range(12)})
  assert load(tmp_path / "numbers", "train").class_names == tuple(map(str, range(12)))
  make(tmp_path / "others", {str(number): 2 for number in range(1, 12)})
  assert load(tmp_path / "others", "train").class_names[:3] == ("1", "10", "11")


def test_the_share_is_a_field(plain):
  few, many = (files(load(plain, "val", validation=share)) for share in (0.1, 0.3))
  assert len(many) > 2 * len(few) and set(few) <= set(many)
  assert len(load(plain, validation=0.0)) == 311
  with pytest.raises(DataError, match=r"no split 'val' .*; it has: train, of which slices can be taken, as train\[:90%\] and"):
    load(plain, "val", validation=0.0)


def test_the_first_tenth_of_the_hashes_is_for_validation(tmp_path):
  """`printf ant/NNN.jpg | sha256sum` begins with less than 0x1999…, a tenth of all values, for these."""
  make(tmp_path, {"ant": 100, "bee": 1})
  assert [os.path.basename(path) for path in files(load(tmp_path, "val"))] == [
    "012.jpg",
    "047.jpg",
    "051.jpg",
    "057.jpg",
    "058.jpg",
    "061.jpg",
    "073.jpg",
    "090.jpg",
  ]


def test_an_added_photograph_moves_no_other(plain):
  before = {split: set(files(load(plain, split))) for split in ("train", "val")}
  sides = set()
  for number in range(40):
    path = plain / "ant" / f"new {number}.jpg"
    path.write_bytes(b"")
    after = {split: set(files(load(plain, split))) for split in ("train", "val")}
    assert all(before[split] == after[split] - {str(path)} for split in before)
    sides |= {split for split in after if str(path) in after[split]}
    path.unlink()
  assert sides == {"train", "val"}


def test_who_stands_in_for_a_class_is_relieved_by_one_that_belongs_there(plain):
  make(plain, {"elk": 40})
  held_out = files(load(plain, "val"))
  elks = [path for path in held_out if "/elk/" in path]
  for path in plain.glob("elk/*"):
    if str(path) in elks:
      path.unlink()
  stand_in = [path for path in files(load(plain, "val")) if "/elk/" in path]
  assert len(elks) > 1 and len(stand_in) == 1 and stand_in[0] not in elks
  make(plain, {"elk": 40})
  assert files(load(plain, "val")) == held_out


def test_a_class_of_one_image_is_for_training(plain):
  make(plain, {"fox": 1})
  lines = []
  assert counts(load(plain, "train", lines.append))[5] == 1 and lines[0].endswith("; classes of a single image have none (1)")
  assert counts(load(plain, "val"))[5] == 0


@pytest.mark.parametrize("train", ["train", "Train", "training"])
@pytest.mark.parametrize("test", ["val", "valid", "Validation", "test", "TESTING"])
def test_folders_are_found_as_users_call_them(tmp_path, train, test):
  make(tmp_path / train, {"ant": 3, "bee": 2})
  make(tmp_path / test, {"ant": 1, "bee": 1})
  lines = []
  assert counts(load(tmp_path, "train", lines.append)) == [3, 2]
  for split in ("val", "validation", "test"):
    assert files(load(tmp_path, split, lines.append)) == [f"{tmp_path}/{test}/{name}/000.jpg" for name in ("ant", "bee")]
  assert lines == []


def test_val_and_test_are_themselves(tmp_path):
  for folder, count in (("train", 3), ("validation", 2), ("test", 1)):
    make(tmp_path / folder, {"ant": count, "bee": 1})
  assert [len(load(tmp_path, split)) for split in ("train", "val", "validation", "test")] == [4, 3, 3, 2]


def test_a_class_may_be_called_train(tmp_path):
  make(tmp_path, {"car": 20, "plane": 20, "train": 20})
  assert load(tmp_path).class_names == ("car", "plane", "train")


@pytest.mark.parametrize(
  "folders, message",
  [
    (("train/ant", "Training/ant"), "has Training/ and train/, which mean the same split, train; expected one of them"),
    (("train/ant", "val/ant", "validation/ant"), "has val/ and validation/, which mean the same split, val"),
    (("train", "test"), "has neither train/ nor val/ with a folder for each class in it, nor two .*; it has: test, train"),
    (("ant",), "nor two folders of images or more, one for each class; it has: ant"),
    (("photos/train/ant", "photos/val/ant", "notes/old"), "has neither .*; it has: notes, photos"),
  ],
)
def test_a_folder_of_another_form_is_refused(tmp_path, folders, message):
  for folder in folders:
    make(tmp_path / folder, {".": 2})
  with pytest.raises(DataError, match=message):
    load(tmp_path)


def test_a_class_without_images_is_named(plain):
  (plain / "runs/digits").mkdir(parents=True)
  with pytest.raises(DataError, match="the class .*photos/runs has no images: it is empty, or has 1 others"):
    load(plain)
