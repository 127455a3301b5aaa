"""What lies beside the shards of a TFDS dataset may come from anyone: it runs no code, and what is wrong is said in a line."""

import json
import os
import sys

import numpy as np
import pytest

from nfnets.config import DataConfig
from nfnets.data.errors import DataError
from nfnets.data.sources.open import open_source
from tests import shards

CORE = "tensorflow_datasets.core.features"


@pytest.fixture
def directory(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return shards.write_dataset(tmp_path, {"train": [3, 2]})


@pytest.fixture
def hostile(tmp_path, monkeypatch):
  """A module that says so when it is imported: (the name of a class in it, whether it was)."""
  (tmp_path / "hostile_module.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
  monkeypatch.syspath_prepend(str(tmp_path))
  yield "hostile_module.Image", (tmp_path / "imported").exists
  sys.modules.pop("hostile_module", None)


def load(directory, split="train"):
  return open_source(DataConfig(name="pictures", dir=str(directory.parents[1])), split)


def fails(message, directory, split="train"):
  with pytest.raises(DataError, match=message) as caught:
    load(directory, split)
  assert "\n" not in str(caught.value)


def change(directory, file, edit):
  """Lets `edit` change the content of a file of JSON."""
  content = json.loads((directory / file).read_text())
  edit(content)
  (directory / file).write_text(json.dumps(content))


# ---- classes that are no class of TFDS's own


def test_a_foreign_class_of_the_image_is_named_and_not_imported(directory, hostile):
  name, imported = hostile
  change(directory, "features.json", lambda value: value["featuresDict"]["features"]["image"].update(pythonClassName=name))
  fails(
    rf"image_key='image' is no Image feature of pictures; it has: .*image \({name}\).* \({directory}/features.json\)", directory
  )
  assert not imported()


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
def test_a_foreign_class_of_the_whole_is_named_and_not_imported(directory, hostile, key):
  name, imported = hostile
  content = json.loads((directory / "features.json").read_text())
  content.pop("pythonClassName")
  (directory / "features.json").write_text(json.dumps({key: name, "content": content["featuresDict"], **content}))
  fails(f"{directory}/features.json: expected {CORE}.features_dict.FeaturesDict as the class of the whole, got {name}", directory)
  assert not imported()


def test_foreign_classes_of_other_features_are_left_alone(directory, hostile):
  name, imported = hostile
  foreign = {"pythonClassName": name, "image": {"dtype": "uint8"}}

  def edit(value):
    sequence = {"pythonClassName": f"{CORE}.sequence_feature.Sequence", "sequence": {"feature": foreign}}
    nested = {"pythonClassName": f"{CORE}.features_dict.FeaturesDict", "featuresDict": {"features": {"inner": foreign}}}
    value["featuresDict"]["features"] |= {"other": foreign, "sequence": sequence, "nested": nested}

  change(directory, "features.json", edit)
  change(directory, "dataset_info.json", lambda value: value.update(features=foreign, moduleName="hostile_module"))
  assert len(load(directory)) == 5
  assert not imported()


# ---- every form that TFDS has written


def test_what_tfds_writes_is_read(directory):
  import tensorflow_datasets as tfds

  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
      "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"]),
      "boxes": tfds.features.Sequence({"box": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(num_classes=9)}),
      "text": tfds.features.Text(),
      "number": tfds.features.Scalar(np.int32),
    }
  )
  features.save_config(str(directory))
  assert load(directory).class_names == ("ant", "bee", "cat")


@pytest.mark.parametrize("packed", [False, True])
def test_the_forms_of_older_versions_are_read(directory, packed):
  facts = json.dumps if packed else lambda value: value
  image = {"type": f"{CORE}.image_feature.Image", "content": facts({"shape": [None, None, 3], "dtype": "uint8"})}
  label = {"type": f"{CORE}.class_label_feature.ClassLabel", "content": facts({"num_classes": 5})}
  features = {"image": image, "label": label}
  whole = {"type": f"{CORE}.features_dict.FeaturesDict", "content": facts({"features": features} if packed else features)}
  (directory / "features.json").write_text(json.dumps(whole))
  assert load(directory).num_classes == 5
  (directory / "label.labels.txt").unlink()
  assert load(directory).class_names == ("0", "1", "2", "3", "4")


# ---- files that are not as TFDS writes them


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize(
  "content", ["", "{", "[]", "3", "null", '"text"', "[" * 100_000, '{"name": 1, "splits": 2}', "{}", "\x00", '{"a": ' * 5000]
)
def test_malformed_metadata_are_an_error_in_a_line(directory, file, content):
  (directory / file).write_text(content)
  fails(f"metadata of pictures under {directory}|{directory}/features.json: |has no split 'train'", directory)


def test_metadata_that_are_not_text_or_no_file(directory):
  (directory / "features.json").write_bytes(b"\xff\xfe\x00")
  fails("metadata of pictures under .* cannot be read .UnicodeDecodeError", directory)
  (directory / "features.json").unlink()
  os.mkfifo(directory / "features.json")
  fails("features.json cannot be read: it is no regular file", directory)


def test_huge_metadata_are_not_read(directory):
  with open(directory / "dataset_info.json", "r+b") as stream:
    stream.truncate(1 << 40)
  fails("dataset_info.json cannot be read: it has 1,099,511,627,776 bytes, more than the 67,108,864 that are read", directory)
  with pytest.raises(DataError, match="has 1,099,511,627,776 bytes; expected metadata of at most 67,108,864"):
    open_source(DataConfig(name="pictures", dir=f"file://{directory.parents[1]}"), "train")


@pytest.mark.parametrize("count", ["1000000000000", "-3", "0.5", "x"])
def test_numbers_of_classes_that_cannot_be(directory, count):
  (directory / "label.labels.txt").unlink()
  change(
    directory, "features.json", lambda value: value["featuresDict"]["features"]["label"].update(classLabel={"numClasses": count})
  )
  fails("features.json: label has .* classes; expected 1 to 1,000,000", directory)


def test_class_names_that_are_too_few_or_not_different(directory):
  for lines, message in (("a\nb\n", "2 different names in 2 lines"), ("a\nb\nc\nd\na\n", "4 different names in 5 lines")):
    (directory / "label.labels.txt").write_text(lines)
    fails(f"label.labels.txt has {message}, but features.json says that there are 5 classes", directory)


@pytest.mark.parametrize("template", ["../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}", "/dev/{SPLIT}-{SHARD_X_OF_Y}"])
def test_shards_elsewhere_are_not_read(directory, template):
  change(directory, "dataset_info.json", lambda value: value["splits"][0].update(filepathTemplate=template))
  fails(f"{directory}/dataset_info.json names the shard .*, which is not in that directory", directory)


@pytest.mark.parametrize("lengths", [["-1", "6"], ["9" * 30], [10**18, 1]])
def test_numbers_of_records_that_cannot_be(directory, lengths):
  change(directory, "dataset_info.json", lambda value: value["splits"][0].update(shardLengths=lengths))
  fails("a shard of 'train' has -1 records; expected at least 0|but dataset_info.json says|cannot be read", directory)


def test_a_dataset_without_splits_says_so(directory):
  change(directory, "dataset_info.json", lambda value: value.update(splits=[]))
  fails(rf"^pictures in {directory} has no split 'train'; it has: none at all \(config.data.train_split\)$", directory)
