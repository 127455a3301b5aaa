"""Goes on, or evaluates, with data that lie elsewhere or are others: told by what they hold, not by where they are."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.train import loop
from nfnets.train.checkpoints.errors import CheckpointError
from nfnets.train.evaluate import evaluate_checkpoint
from tests.train.test_loop import TINY

pytestmark = pytest.mark.usefixtures("two_devices")
CLASSES = ("cat", "dog", "owl")


def write_images(directory: pathlib.Path, classes=CLASSES) -> pathlib.Path:
  """Writes 8 training and 4 test images a class, 8 pixels a side, and shades of grey that tell the classes apart."""
  rng = np.random.default_rng(0)
  for split, count in (("train", 8), ("val", 4)):
    for label, name in enumerate(classes):
      (directory / split / name).mkdir(parents=True)
      for number in range(count):
        pixels = rng.integers(80 * label, 80 * label + 40, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(directory / split / name / f"{number}.png")
  return directory


def config(directory: pathlib.Path, **changes) -> Config:
  return Config(
    model=ModelConfig(name="nfnet_tiny", overrides=dict(TINY)),
    data=DataConfig(name="folder", dir=str(directory), test_split="val"),
    optim=OptimConfig(base_lr=0.1, warmup_epochs=0, ema_decay=0.9),
    batch=8,
    eval_batch=8,
    **{"epochs": 1.0, **changes},
  )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
  """A directory with data/ and the finished run of one epoch on them, run/."""
  where = tmp_path_factory.mktemp("trained")
  assert loop.train(config(write_images(where / "data")), str(where / "run")).finished
  return where


@pytest.fixture
def copy(trained, tmp_path) -> pathlib.Path:
  return shutil.copytree(trained, tmp_path / "copy")


def test_the_same_images_in_another_directory_are_the_same_data(copy):
  (copy / "data").rename(copy / "moved")
  assert loop.train(config(copy / "moved"), str(copy / "run")).finished
  assert evaluate_checkpoint(config(copy / "moved"), str(copy / "run"), say=lambda line: None).step == 3


def test_other_files_of_the_same_number_are_other_data(copy):
  image = copy / "data" / "train" / "dog" / "3.png"
  image.rename(image.with_name("3b.png"))
  with pytest.raises(CheckpointError, match=r"saw other data: files of other names or lengths \(fingerprint [0-9a-f]{16}, now "):
    loop.train(config(copy / "data"), str(copy / "run"))


def rename_class(data: pathlib.Path, before: str, now: str) -> None:
  for split in ("train", "val"):
    (data / split / before).rename(data / split / now)


@pytest.mark.parametrize(
  ("renames", "words"),
  [([("cat", "zebra")], r"class 0 was 'cat', is 'dog' \(and 2 more\)"), ([("dog", "emu")], "class 1 was 'dog', is 'emu'")],
)
def test_renamed_class_folders_are_refused_in_training_and_evaluation(copy, renames, words):
  for before, now in renames:
    rename_class(copy / "data", before, now)
  with pytest.raises(CheckpointError, match=f"saw other data: .*{words}; take another directory"):
    loop.train(config(copy / "data"), str(copy / "run"))
  with pytest.raises(
    CheckpointError, match=f"name='folder' has other classes than the checkpoint .*run/checkpoints/3: {words}; expected"
  ):
    evaluate_checkpoint(config(copy / "data"), str(copy / "run"), say=lambda line: None)


def test_names_are_in_the_checkpoint(copy):
  meta = json.loads((copy / "run" / "checkpoints" / "3" / "meta" / "metadata").read_text())
  assert meta["data"]["class_names"] == list(CLASSES) and len(meta["data"]["fingerprint"]) == 16
