"""launch.data describes a dataset, finds what is damaged in it, and writes it smaller."""

import contextlib
import importlib
import json
import pathlib
import sys

import cv2
import numpy as np
import pytest

from launch import cli
from nfnets.config import DataConfig
from nfnets.data.errors import DataError
from nfnets.data.images import decode
from nfnets.data.sources.base import Record
from nfnets.data.sources.open import open_source
from nfnets.data.storage import tfrecord
from nfnets.data.tools import inspect, prepare
from tests import shards

ROOT = pathlib.Path(__file__).resolve().parents[2]
DIGITS = "--config=configs/digits.py"
SPLITS = {"train": [6, 5], "validation": [4]}


def jpeg(number: int, height: int = 40, width: int = 60) -> bytes:
  pixels = np.random.default_rng(number).integers(0, 256, (5, 5, 3), np.uint8)
  return cv2.imencode(".jpg", cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC))[1].tobytes()


@pytest.fixture
def photos(tmp_path, monkeypatch) -> DataConfig:
  """Writes a dataset of 11 and 4 JPEGs of 40×60 pixels, of which record 3 of train has 20×30."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  sizes = {("train", 3): (20, 30)}
  monkeypatch.setattr(shards, "image_of", lambda split, i: jpeg(i + len(split), *sizes.get((split, i), (40, 60))))
  shards.write_dataset(tmp_path / "data", SPLITS)
  return DataConfig(name="pictures", dir=str(tmp_path / "data"), test_split="validation")


def flags_of(config: DataConfig) -> list[str]:
  return [DIGITS, *(f"--config.data.{key}={getattr(config, key)}" for key in ("name", "dir", "test_split"))]


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
  module = importlib.import_module("launch.data")
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(sys, "argv", ["launch/data.py", *arguments])
  with pytest.raises(SystemExit) as exit_:
    cli.main(module.run, module.define, module.__doc__, arguments=True)
  return exit_.value.code, *capsys.readouterr()


def flip_byte(path: pathlib.Path, number: int) -> int:
  """Damages the middle of a record's payload; returns the byte at which the record begins."""
  data = bytearray(path.read_bytes())
  lengths = tfrecord.scan(str(path), len(data), lambda at, length: bytes(data[at : at + length]))
  begin = int(sum(lengths[:number] + tfrecord.HEADER + tfrecord.FOOTER))
  data[begin + tfrecord.HEADER + int(lengths[number]) // 2] ^= 1
  path.write_bytes(data)
  return begin


def images_of(config: DataConfig, train: bool = True) -> list[Record]:
  with contextlib.closing(open_source(config, config.train_split if train else config.test_split)) as source:
    return [source[i] for i in range(len(source))]


def test_describe_draws_what_is_stored_and_what_training_sees(monkeypatch, capsys, tmp_path):
  out = tmp_path / "grid.png"
  status, said, _ = call(monkeypatch, capsys, "describe", DIGITS, f"--out={out}", "--augmented")
  assert status == 0
  assert "digits train: 1,437 records, 10 classes" in said and "digits test: 360 records" in said
  assert "height 8 / 8 / 8, width 8 / 8 / 8, mean 192 bytes" in said
  assert "10 classes: 0, 1, 2" in said and f"pictures: {out}" in said
  height, width = cv2.imread(str(out)).shape[:2]
  assert height > 1.2 * width  # it holds two grids


def test_describe_writes_a_file_only_when_asked(monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(inspect, "draw", lambda out, grids: pytest.fail(f"drew {out}"))
  status, said, _ = call(monkeypatch, capsys, "describe", DIGITS)
  assert status == 0 and "10 classes: 0, 1, 2" in said and "pictures" not in said


def test_summary_of_a_prepared_dataset(photos):
  assert inspect.known_splits(photos) == {"train": 11, "validation": 4}
  with contextlib.closing(open_source(photos, photos.train_split)) as source:
    summary = inspect.summarize(source)
    pictures = inspect.stored_pictures(source)
  assert summary.counts.tolist() == [3, 2, 2, 2, 2] and summary.labels_read == 11 and not summary.corrupt
  assert (summary.heights.min(), summary.heights.max(), summary.widths.max()) == (20, 40, 60)
  assert len(pictures) == 11 and pictures[3][0].shape == (20, 30, 3) and pictures[3][1] == "class 3"


def test_verify_names_shard_and_byte_of_what_is_corrupt(photos, monkeypatch, capsys):
  status, said, _ = call(monkeypatch, capsys, "verify", *flags_of(photos))
  assert status == 0 and "corrupt:" not in said
  shard = pathlib.Path(photos.dir, "pictures", "1.0.0", "pictures-train.tfrecord-00001-of-00002")
  begin = flip_byte(shard, 2)
  status, said, _ = call(monkeypatch, capsys, "verify", *flags_of(photos))
  assert status == 1
  assert f"corrupt: {shard} at byte {begin} (record 3 of 5): the checksum of its bytes is wrong" in said
  status, said, _ = call(monkeypatch, capsys, "verify", *flags_of(photos), "--split=validation")
  assert status == 0 and "4 of 4 records" in said


def test_verify_finds_images_that_cannot_be_decoded(photos, monkeypatch):
  monkeypatch.setattr(shards, "image_of", lambda split, i: b"" if i == 1 else jpeg(i)[:-200] if i == 2 else jpeg(i))
  directory = shards.write_dataset(pathlib.Path(photos.dir), {"train": [4]}, name="broken")
  with contextlib.closing(open_source(DataConfig(name="broken", dir=photos.dir), "train")) as source:
    checked = inspect.verify(source)
  assert checked.records == 4 and checked.bytes == len(jpeg(0)) + len(jpeg(3))
  assert len(checked.corrupt) == 2 and "(record 2 of 4): no bytes at all" in checked.corrupt[0]
  assert str(directory) in checked.corrupt[1] and "truncated" in checked.corrupt[1]


def test_prepared_dataset_has_the_same_records_smaller(photos, monkeypatch, capsys, tmp_path):
  out = tmp_path / "small"
  status, said, _ = call(monkeypatch, capsys, "prepare", *flags_of(photos), f"--out={out}", "--short_side=20", "--shards=3")
  assert status == 0 and f"use it with: --config.data.dir={out}" in said
  small = DataConfig(name="pictures", dir=str(out), test_split="validation")
  for train in (True, False):
    before, after = images_of(photos, train), images_of(small, train)
    assert [record.label for record in after] == [record.label for record in before]
    for old, new in zip(before, after, strict=True):
      pixels = decode.pixels(new.image)
      assert pixels.shape == (20, 30, 3)
      expected = cv2.resize(decode.pixels(old.image), (30, 20), interpolation=cv2.INTER_AREA)
      assert np.abs(pixels.astype(int) - expected).mean() < 8  # JPEG stores colours at half the resolution
  assert images_of(small)[3].image == images_of(photos)[3].image  # it was small enough, so not a byte is changed
  with contextlib.closing(open_source(small, small.train_split)) as source:
    assert source.class_names == tuple(f"class {i}" for i in range(5)) and not inspect.verify(source).corrupt
  import tensorflow_datasets as tfds

  info = tfds.builder_from_directory(out / "pictures" / "1.0.0").info
  assert {name: split.shard_lengths for name, split in info.splits.items()} == {"train": [3, 4, 4], "validation": [4]}
  assert info.features["label"].names[2] == "class 2"


def test_an_interrupted_shard_is_made_again_and_the_finished_are_kept(photos, tmp_path):
  job = prepare.Preparation(photos, str(tmp_path / "whole"), short_side=20, shards=3)
  with contextlib.closing(job):
    expected = job.run()

  def stop(done: int) -> None:
    if done == 5:
      raise KeyboardInterrupt

  with contextlib.closing(prepare.Preparation(photos, str(tmp_path / "out"), short_side=20, shards=3)) as job:
    with pytest.raises(KeyboardInterrupt):
      job.run(stop)
  path = pathlib.Path(job.path)
  assert sorted(file.name for file in path.iterdir()) == ["pictures-train.tfrecord-00000-of-00003", "prepared.json"]
  kept = (path / "pictures-train.tfrecord-00000-of-00003").stat().st_mtime_ns
  (path / ".pictures-train.tfrecord-00001-of-00003.0123456789ab.tmp").write_bytes(b"of a run that was killed")
  with contextlib.closing(prepare.Preparation(photos, str(tmp_path / "out"), short_side=20, shards=3)) as job:
    assert (job.done, job.total) == (3, 15)
    made = job.run()
  assert (made.kept, made.shards, made.records) == (1, 4, {"train": 11, "validation": 4})
  assert (path / "pictures-train.tfrecord-00000-of-00003").stat().st_mtime_ns == kept
  assert not list(path.glob(".*.tmp"))
  for file in pathlib.Path(expected.path).iterdir():
    assert (path / file.name).read_bytes() == file.read_bytes()


def test_other_settings_and_other_datasets_are_not_overwritten(photos, monkeypatch, capsys, tmp_path):
  with contextlib.closing(prepare.Preparation(photos, str(tmp_path / "out"), short_side=20)) as job:
    job.run()
  for wrong, expected in (
    (["--quality=80", "--short_side=20"], "was made with quality=90, now 80"),
    (["--short_side=24"], "was made with short_side=20, now 24"),
  ):
    status, _, err = call(monkeypatch, capsys, "prepare", *flags_of(photos), f"--out={tmp_path / 'out'}", *wrong)
    assert status == 2 and expected in err and err.count("\n") == 1
  status, _, err = call(monkeypatch, capsys, "prepare", *flags_of(photos), f"--out={photos.dir}")
  assert status == 2 and "something that this program did not write" in err


def test_corrupt_records_are_left_out_or_too_many(photos, monkeypatch, tmp_path):
  monkeypatch.setattr(shards, "image_of", lambda split, i: b"no image" if (split, i) == ("train", 2) else jpeg(i))
  shards.write_dataset(pathlib.Path(photos.dir), {"train": [8], "validation": [2]}, name="broken")
  config = DataConfig(name="broken", dir=photos.dir, train_split="train[:50%]", test_split="validation", max_corrupt=0.2)
  said = []
  with contextlib.closing(prepare.Preparation(config, str(tmp_path / "out"), say=said.append)) as job:
    made = job.run()
  assert made.records == {"train": 7, "validation": 2} and made.lost == 1
  assert any("corrupt record, left out" in line and "(record 3 of 8): not an image" in line for line in said)
  strict = DataConfig(name="broken", dir=photos.dir, test_split="validation", max_corrupt=0.0)
  with (
    contextlib.closing(prepare.Preparation(strict, str(tmp_path / "strict"))) as job,
    pytest.raises(DataError, match="max_corrupt=0"),
  ):
    job.run()


def test_pixels_become_lossless_images_under_another_name(tmp_path):
  with contextlib.closing(prepare.Preparation(DataConfig(), str(tmp_path))) as job:
    made = job.run()
  assert made.name == "digits_prepared"
  before, after = (
    images_of(DataConfig(), False),
    images_of(DataConfig(name="digits_prepared", dir=str(tmp_path), index_dir=str(tmp_path)), False),
  )
  assert all(np.array_equal(decode.pixels(new.image), old.image) for old, new in zip(before, after, strict=True))
  assert json.loads(pathlib.Path(made.path, "dataset_info.json").read_text())["name"] == "digits_prepared"


@pytest.mark.parametrize(
  "name, expected",
  [("imagenet2012:5.1.0", "imagenet2012"), ("kaggle:birds/small:1.*.*", "birds_small"), ("folder", "folder_prepared")],
)
def test_prepared_name(name, expected):
  assert prepare.prepared_name(name) == expected


@pytest.mark.parametrize(
  "arguments, expected",
  [
    ([], "subcommand: got nothing, expected describe or verify or prepare"),
    (["prepar", DIGITS], "expected prepare"),
    (["describe", "stray", DIGITS], "unexpected argument 'stray'"),
    (["describe"], "--config is missing"),
    (["describe", DIGITS, "--augmented"], "--augmented adds to the picture, but --out is missing"),
    (["describe", DIGITS, "--out=/no/such/grid.png"], "--out=/no/such/grid.png: there is no directory /no/such"),
    (["describe", DIGITS, "--out=configs"], "the picture configs cannot be written: Is a directory"),
    (["prepare", DIGITS], "--out is missing"),
    (["prepare", DIGITS, "--out=gs://bucket"], "prepared shards are written to disks"),
    (["prepare", DIGITS, "--out=README.md"], "cannot be written: Not a directory"),
    (["verify", DIGITS, "--split=valid"], "digits has the splits 'train' and 'test', got 'valid'"),
  ],
)
def test_mistakes_are_one_line(arguments, expected, monkeypatch, capsys):
  status, _, err = call(monkeypatch, capsys, *arguments)
  assert status == 2 and expected in err and err.startswith("error: ") and err.count("\n") == 1


def test_what_holds_for_both_splits_of_a_folder_is_said_once(tmp_path, monkeypatch, capsys):
  for name in ("ant", "bee"):
    (tmp_path / "photos" / name).mkdir(parents=True)
    for number in range(4):
      (tmp_path / "photos" / name / f"{number}.jpg").write_bytes(jpeg(number))
  recipe = ("--config=configs/folder.py", f"--config.data.dir={tmp_path}/photos")
  for arguments in (("describe",), ("verify",), ("prepare", f"--out={tmp_path}/out")):
    status, out, _ = call(monkeypatch, capsys, *arguments, *recipe)
    assert status == 0 and out.count("no train/ and val/ in") == 1
