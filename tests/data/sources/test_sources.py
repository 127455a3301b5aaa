"""Sources give the records of a split by number, and say in one line what is wrong with a request or a file."""

import concurrent.futures
import json
import os
import re
import sys

import numpy as np
import pytest

from nfnets.config import DataConfig
from nfnets.data.errors import CorruptRecord, DataError
from nfnets.data.sources.base import Record
from nfnets.data.sources.examples import ArrayRecordSource
from nfnets.data.sources.open import open_source
from nfnets.data.storage.index import default_cache_dir
from tests import shards

SPLITS = {"train": [4, 3, 5], "validation": [2, 2]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  return tmp_path / "xdg" / "nfnets"


@pytest.fixture
def root(tmp_path):
  shards.write_dataset(tmp_path / "sets", SPLITS)
  return tmp_path / "sets"


def load(root, split="train", **fields):
  return open_source(DataConfig(name=fields.pop("name", "pictures"), dir=str(root), train_split=split, **fields), split)


def contents(source):
  try:
    return [(source[i].image, source[i].label) for i in range(len(source))]
  finally:
    source.close()


def expected(split, *numbers):
  return [(shards.image_of(split, i), i % 5) for i in numbers]


def fails(message, root, *args, **fields):
  with pytest.raises(DataError, match=message) as caught:
    load(root, *args, **fields)
  assert "\n" not in str(caught.value)


# ---- TFRecord


@pytest.mark.parametrize(
  "split, parts",
  [
    ("train", [("train", range(12))]),
    ("train[10:]", [("train", [10, 11])]),
    ("train[:98%]", [("train", range(12))]),
    ("train[25%:-10%]", [("train", range(3, 11))]),
    ("validation[3:]+train[5:6]+train[3:5]", [("validation", [3]), ("train", [5, 3, 4])]),
    ("train+validation", [("train", range(12)), ("validation", range(4))]),
  ],
)
def test_split_expressions_are_exact(root, split, parts):
  assert contents(load(root, split)) == sum((expected(name, *numbers) for name, numbers in parts), [])


def test_what_a_source_tells(root, cache):
  lines = []
  config = DataConfig(name="pictures", dir=str(root), test_split="validation", num_classes=5)
  source = open_source(config, "validation", progress=lines.append)
  assert (source.name, source.split, source.remote, source.num_classes) == ("pictures", "validation", False, 5)
  assert source.class_names == tuple(f"class {i}" for i in range(5))
  first = len(shards.framed(shards.example(file_name=b"x", image=shards.image_of("validation", 2), label=2)))
  shard = root / "pictures" / "1.0.0" / "pictures-validation.tfrecord-00001-of-00002"
  assert source.address(3) == f"{shard} at byte {first} (record 2 of 2)"
  assert len(lines) == 1 and len(list(cache.iterdir())) == 1
  source.prefetch(np.arange(4))
  with pytest.raises(IndexError):
    source[4]
  source.close()
  open_source(config, "validation", progress=lines.append).close()
  assert len(lines) == 1
  open_source(DataConfig(name="pictures", dir=str(root), index_dir=str(root / "here")), "train").close()
  assert len(list((root / "here").iterdir())) == 1


def test_threads_read_what_one_reads_and_tensorflow_stays_out(root):
  source = load(root)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    records = list(pool.map(lambda i: (source[i].image, source[i].label), [*range(12)] * 40))
  assert records == contents(source) * 40
  assert "tensorflow" not in sys.modules


def test_the_newest_version_is_read_and_another_can_be_named(root):
  shards.write_dataset(root, {"train": [1]}, version="2.0.0")
  (root / "pictures" / "3.0.0.incompleteABCDEF").mkdir()
  assert len(load(root)) == 1
  assert len(load(root, name="pictures:1.0.0")) == 12
  fails("pictures:4.0.0 is not prepared", root, name="pictures:4.0.0")


def test_a_bucket_gives_the_same(root):
  source = open_source(DataConfig(name="pictures", dir=f"file://{root}"), "train[2:]+validation")
  assert source.remote and source.address(0).startswith("file://")
  source.prefetch(np.arange(14)[::-1])
  assert contents(source) == expected("train", *range(2, 12)) + expected("validation", *range(4))


def test_what_is_wrong_with_the_request(root):
  fails(r"^pictures in .*/pictures/1.0.0 has no split 'test'; it has: train \(12\), validation \(4\)", root, "test")
  fails(r"no split 'train\[:13\]' \(Requested slice \[:13\] incompatible with 12", root, "train[:13]")
  fails(r"no split 'train\[' .*\(config.data.train_split\)$", root, "train[")
  with pytest.raises(DataError, match="validation .4.$"):
    open_source(DataConfig(name="pictures", dir=str(root)), "valid")
  fails("no split 'all", root, "all[:2]")
  fails(r"split 'train\[5:3\]' of pictures is empty \(config.data.train_split\)", root, "train[5:3]")
  fails(
    r"image_key='file_name' is no Image feature of pictures; it has: file_name \(Text\), image \(Image\), label \(C",
    root,
    image_key="file_name",
  )
  fails("label_key='image' is no ClassLabel feature", root, label_key="image")
  fails("label_key='nothing' is no ClassLabel feature", root, label_key="nothing")
  fails("num_classes=7, but pictures has 5 classes", root, num_classes=7)
  fails("unknown dataset config.data.name='picturs'; near: .*pictures", root, name="picturs")
  fails("mnist is not prepared under .*: tfds build mnist --data_dir=", root, name="mnist")
  fails("tfds build imagenet2012 .*downloaded by hand", root, name="imagenet2012")
  fails("is not a directory; prepare it once", root / "nowhere")
  (root / "empty").mkdir()
  fails("empty is not prepared", root, name="empty")


def test_what_is_wrong_with_the_files(root):
  directory = root / "pictures" / "1.0.0"
  shard = directory / "pictures-train.tfrecord-00001-of-00003"
  whole = shard.read_bytes()
  shard.write_bytes(whole[:-1])
  fails(f"{shard} is truncated: record 3 at byte ", root)
  shards.write_shard(shard, [b"", b""])
  fails(f"shard {shard} holds 2 records, but dataset_info.json says 3", root)
  shard.write_bytes(b"")
  fails(rf"{shard} is empty \(0 bytes\)", root)
  shard.unlink()
  fails(f"shard {shard} cannot be read: No such file", root)
  assert len(load(root, "train[:4]")) == 4  # needs the first shard only
  (directory / "dataset_info.json").write_text("{")
  fails("metadata of pictures under .* cannot be read", root)


def test_other_formats_and_images_that_are_none(root):
  shards.write_metadata(root / "other" / "1.0.0", "other", {"train": [1]}, classes=2, file_format="riegeli")
  fails("is stored as riegeli, not as tfrecord or array_record", root, name="other")
  features = root / "pictures" / "1.0.0" / "features.json"
  content = json.loads(features.read_text())
  content["featuresDict"]["features"]["image"]["image"] = {"dtype": "float32", "shape": {"dimensions": ["-1", "-1", "1"]}}
  features.write_text(json.dumps(content))
  fails("images of pictures are .*float32", root)


def test_corrupt_records_are_named_when_read(root):
  directory = root / "pictures" / "1.0.0"
  shard = directory / "pictures-train.tfrecord-00001-of-00003"
  good, image = shards.example(image=b"fine", label=1), b"x"
  shards.write_shard(shard, [shards.example(image=image), shards.example(image=image, label=-1), good])
  source = load(root)
  with pytest.raises(CorruptRecord, match=rf"{shard} at byte 0 \(record 1 of 3\): it has no feature 'label'"):
    source[4]
  with pytest.raises(DataError, match=r"record 2 of 3\): its label is -1, not in \[0, 5\)") as caught:
    source[5]
  assert not isinstance(caught.value, CorruptRecord)  # not to be passed over: every record may be so
  assert source[6] == Record(b"fine", 1)
  data = shard.read_bytes()
  shard.write_bytes(data[:-6] + bytes([data[-6] ^ 1]) + data[-5:])
  with pytest.raises(CorruptRecord, match=r"record 3 of 3\): the checksum of its bytes is wrong"):
    source[6]
  with shard.open("r+b") as stream:
    stream.truncate(len(data) - 20)
  with pytest.raises(CorruptRecord, match=r"record 3 of 3\): cannot be read: the file ends at byte"):
    source[6]
  source.close()


def test_a_file_that_vanishes_is_a_corrupt_record(root):
  source = load(root)
  (root / "pictures" / "1.0.0" / "pictures-train.tfrecord-00002-of-00003").unlink()
  with pytest.raises(CorruptRecord, match="00002-of-00003 at byte 0 .*: cannot be read: No such file"):
    source[7]
  source.close()


# ---- array_record


def test_array_record_gives_what_tfrecord_gives(root, tmp_path):
  from array_record.python import array_record_module as module

  directory = tmp_path / "rows" / "pictures" / "1.0.0"
  shards.write_metadata(directory, "pictures", SPLITS, classes=5, file_format="array_record")
  for split, lengths in SPLITS.items():
    number = 0
    for shard, length in enumerate(lengths):
      path = directory / f"pictures-{split}.array_record-{shard:05d}-of-{len(lengths):05d}"
      writer = module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
      for i in range(number, number + length):
        writer.write(shards.example(file_name=b"x", image=shards.image_of(split, i), label=i % 5))
      writer.close()
      number += length
  for split in ("train", "train[3:-2]+validation[1:]", "train[25%:]"):
    source = load(tmp_path / "rows", split)
    assert isinstance(source, ArrayRecordSource)
    assert contents(source) == contents(load(root, split))
  assert source.address(2).endswith("pictures-train.array_record-00001-of-00003 (record 2 of 3)")
  with pytest.raises(IndexError):
    source[9]
  fails("array_record, which is read from disks only", f"file://{tmp_path}/rows")

  shard = directory / "pictures-train.array_record-00001-of-00003"
  whole = shard.read_bytes()
  payload = whole.index(shards.image_of("train", 4))  # written uncompressed
  shard.write_bytes(whole[:payload] + bytes([whole[payload] ^ 1]) + whole[payload + 1 :])
  with pytest.raises(CorruptRecord, match=r"00001-of-00003 \(record 1 of 3\): cannot be read"):
    contents(load(tmp_path / "rows", "train[4:5]"))
  shard.write_bytes(whole[: len(whole) // 2])
  fails(f"shard {shard} (is truncated|holds)", tmp_path / "rows")
  shard.write_bytes(b"")
  fails(f"shard {shard} is empty", tmp_path / "rows")
  shard.unlink()
  fails(f"shard {shard} cannot be read: No such file", tmp_path / "rows")


# ---- folders


@pytest.fixture
def folder(tmp_path):
  top = tmp_path / "images"
  for path in (
    "train/cat/b.JPEG",
    "train/cat/a.jpg",
    "train/ant/c.png",
    "train/ant/._c.png",
    "train/ant/notes.txt",
    "train/dog/z.jpeg",
    "val/dog/1.jpg",
    "val/ant/2.JPG",
  ):
    (top / path).parent.mkdir(parents=True, exist_ok=True)
    (top / path).write_bytes(path.encode())
  return top


def names(source):
  return [(record[0].decode(), record[1]) for record in contents(source)]


def test_a_folder_of_class_folders(folder):
  train = [("train/ant/c.png", 0), ("train/cat/a.jpg", 1), ("train/cat/b.JPEG", 1), ("train/dog/z.jpeg", 2)]
  held_out = [("val/ant/2.JPG", 0), ("val/dog/1.jpg", 2)]
  source = load(folder, name="folder", num_classes=3)
  assert (source.class_names, source.address(1)) == (("ant", "cat", "dog"), str(folder / "train/cat/a.jpg"))
  assert names(source) == train
  for split in ("val", "validation", "test"):
    assert names(load(folder, split, name="folder")) == held_out
  assert names(load(folder, "train+val", name="folder")) == train + held_out
  assert sorted(names(load(folder, "train[:50%]+train[50%:]", name="folder"))) == train
  (folder / "train/cat/link.jpg").symlink_to(folder / "val/dog/1.jpg")
  (folder / "train/elk").symlink_to(folder / "val/ant")
  assert names(load(folder, name="folder"))[3:] == [("val/dog/1.jpg", 1), train[3], ("val/ant/2.JPG", 3)]


def test_what_is_wrong_with_a_folder(folder):
  fails("no split 'tain' .*; it has: train, val", folder, "tain", name="folder")
  fails(r"no split 'train\[:9\]'", folder, "train[:9]", name="folder")
  fails("num_classes=2, but folder has 3", folder, name="folder", num_classes=2)
  fails("is not a directory", folder / "nowhere", name="folder")
  fails("is not a directory", "", name="folder")
  fails("read from disks only", "gs://bucket/images", name="folder")
  fails("has neither train/ nor val/ .*; it has: c.png", folder / "train" / "ant", name="folder")
  source = load(folder, name="folder")
  (folder / "train/dog/z.jpeg").unlink()
  with pytest.raises(CorruptRecord, match=f"{folder}/train/dog/z.jpeg: cannot be read: No such file"):
    source[3]
  (folder / "train/dog/z.jpeg").write_bytes(b"")
  assert source[3] == Record(b"", 2)
  (folder / "val/eel").mkdir()
  fails("val/eel is a class that train/ has not", folder, "val", name="folder")
  (folder / "train/ant/c.png").unlink()
  fails("the class .*/train/ant has no images: it is empty, or has 1 others than .jpg .jpeg .png .gif", folder, name="folder")


@pytest.mark.parametrize("below", ["", "ILSVRC/Data/CLS-LOC"])
def test_the_flat_validation_folder_of_imagenet(tmp_path, below):
  top = tmp_path / "kaggle" / below
  for path in (
    "train/n02/n02_1.JPEG",
    "train/n01/n01_9.JPEG",
    "val/ILSVRC2012_val_00000002.JPEG",
    "val/ILSVRC2012_val_00000001.JPEG",
    "test/ILSVRC2012_test_00000001.JPEG",
  ):
    (top / path).parent.mkdir(parents=True, exist_ok=True)
    (top / path).write_bytes(path.encode())
  table = tmp_path / "kaggle" / "LOC_val_solution.csv"
  lines = ["ImageId,PredictionString", "ILSVRC2012_val_00000001,n02 1 2 3 4 n02 5 6 7 8 ", "ILSVRC2012_val_00000002,n01 9 9 9 9 "]
  table.write_text("\n".join(lines))
  expected = [("val/ILSVRC2012_val_00000001.JPEG", 1), ("val/ILSVRC2012_val_00000002.JPEG", 0)]
  for split in ("test", "validation", "val"):
    assert names(load(tmp_path / "kaggle", split, name="folder")) == expected
  assert names(load(tmp_path / "kaggle", name="folder")) == [("train/n01/n01_9.JPEG", 0), ("train/n02/n02_1.JPEG", 1)]
  table.write_text("\n".join(lines[:2]))
  fails(r"no line for .*val_00000002.JPEG \(1 of 2 images", tmp_path / "kaggle", "val", name="folder")
  table.write_text("\n".join(lines).replace("n01", "n07"))
  fails("names the class 'n07', which is no folder of train/", tmp_path / "kaggle", "val", name="folder")
  table.write_text("ImageId\nx\n")
  fails("LOC_val_solution.csv cannot be read: expected lines", tmp_path / "kaggle", "val", name="folder")
  table.unlink()
  fails("no split 'val'", tmp_path / "kaggle", "val", name="folder")


# ---- in memory


def test_digits():
  train, test = (open_source(DataConfig(), split) for split in ("train", "test"))
  assert (len(train), len(test), train.num_classes) == (1437, 360, 10)
  record = train[5]
  assert record.image.shape == (8, 8, 3) and record.image.dtype == np.uint8 and isinstance(record.label, int)
  assert np.bincount([test[i].label for i in range(360)]).min() >= 34
  assert re.fullmatch(r"digits test \(record 6 of 360\)", test.address(5))
  fails("digits has the splits", "", "valid", name="digits")


def test_synthetic():
  first, again, other = (load("", split, name="synthetic", num_classes=7, image_size=12) for split in ("train", "train", "test"))
  assert first[3].image.shape == (12, 12, 3) and first.num_classes == 7
  np.testing.assert_array_equal(first[3].image, again[3].image)
  assert (first[3].image != other[3].image).any()


def test_the_cache_directory_follows_the_environment(monkeypatch):
  monkeypatch.delenv("XDG_CACHE_HOME")
  assert default_cache_dir() == os.path.expanduser("~/.cache/nfnets")
