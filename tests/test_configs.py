"""Every recipe of configs/: each of its arguments builds, and two real steps run on a few JPEGs in TFDS's TFRecords."""

import dataclasses
import importlib
import io
import pathlib
import re
import threading

import numpy as np
import pytest
from PIL import Image

from nfnets import models, optim
from nfnets.config import Config
from nfnets.errors import UserError
from nfnets.train import loop, resolve
from nfnets.train.logs.logbook import read_jsonl
from tests import shards

ROOT = pathlib.Path(__file__).resolve().parent.parent
ARGUMENTS = {
  "nfnet": [f"F{level}{plus}" for level in range(8) for plus in ("", "+")] + ["F0,minival"],
  "nf_resnet": ["50", "101", "152", "200", "288", "600", "50,bs=4096", "101,bs=256,minival"],
  "nf_regnet": ["B0", "B1", "B2", "B3", "B4", "B5", "B5,minival"],
  "resnet": ["50", "101", "50,minival"],
  "cifar10": ["norm=none", "norm=batch"],
  "digits": [""],
  "folder": ["nf_resnet26", "nfnet_f0,epochs=90", "nfnet_tiny,bs=16,epochs=5", "eca_nfnet_l0,bs=128"],
  "finetune": ["nf_resnet_tiny", "nfnet_f0,weights=runs/f0", "nf_regnet_b0,epochs=5,weights=a=b/checkpoints/7"],
  "synthetic": ["nfnet_f0", "nf_regnet_b0"],
}


def get(file: str, argument: str) -> Config:
  return importlib.import_module(f"configs.{file}").get_config(argument)


def test_every_recipe_is_listed_here():
  files = [path.stem for path in (ROOT / "configs").glob("*.py")]
  recipes = [file for file in files if hasattr(importlib.import_module(f"configs.{file}"), "get_config")]
  assert sorted(ARGUMENTS) == sorted(recipes) and set(files) - set(recipes) == {"imagenet"}


@pytest.mark.parametrize("file, argument", [(file, argument) for file, arguments in ARGUMENTS.items() for argument in arguments])
def test_every_argument_builds(file, argument):
  """The model exists, and what follows from its variant is filled in."""
  config = get(file, argument)
  config.validate()
  data, variant = resolve.data_config(config), models.variant(config.model.name, **config.model.all_overrides())
  sizes = variant.train_resolution, variant.test_resolution
  assert data.train_crop == "none" or (data.image_size, data.test_image_size) == sizes
  steps = int(1000 * config.epochs)
  assert optim.make_schedule(config.optim, batch=config.batch, steps_per_epoch=1000, total_steps=steps)(0) == 0


def test_papers_hyperparameters_follow_from_the_variant():
  strength = {
    name: (data.randaugment_layers, data.randaugment_magnitude, data.image_size, data.test_image_size)
    for name in ("F0", "F1", "F3", "F7")
    for data in [resolve.data_config(get("nfnet", name))]
  }
  assert strength == {"F0": (4, 5, 192, 256), "F1": (4, 10, 224, 320), "F3": (4, 15, 320, 416), "F7": (4, 15, 480, 608)}
  decay = [get("nf_regnet", f"B{level}").optim.weight_decay for level in range(6)]
  assert decay == pytest.approx([5e-5, 6e-5, 7e-5, 8e-5, 9e-5, 1e-4])
  assert {bs: get("nf_resnet", f"50,bs={bs}").optim.clipping for bs in (1024, 4096)} == pytest.approx({1024: 0.04, 4096: 0.01})
  assert get("nfnet", "F0,minival").data.train_split == "train[10000:]"


@pytest.mark.parametrize(
  "file, argument",
  [
    ("nfnet", "F8"),
    ("nfnet", "F0,minval"),
    ("nf_resnet", "51"),
    ("nf_resnet", "50,bs=x"),
    ("nf_regnet", "B6"),
    ("resnet", "49"),
    ("finetune", ""),
    ("finetune", "nf_resnet"),
    ("finetune", "nfnet_f0,epoch=3"),
    ("finetune", "nfnet_f0,epochs=x"),
    ("finetune", "nfnet_f0,epochs=0"),
    *(
      ("folder", argument)
      for argument in ("nfnet_f9", "resnet50", "nf_resnet26,epochs=0", "nfnet_l0,bs=8,bs=9", "nfnet_l0,minival")
    ),
  ],
)
def test_a_mistyped_argument_is_refused_with_what_is_expected(file, argument):
  with pytest.raises(ValueError, match=f"configs/{file}.py takes .*[;,] got '{argument}'"):
    get(file, argument)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
  """imagenet2012 with 16 and 10 JPEGs of a few sizes, cifar10 with 16 and 10 PNGs, as TFDS lays them out."""
  root = tmp_path_factory.mktemp("datasets")
  rng = np.random.default_rng(0)
  for name, classes, kind, sizes in (
    ("imagenet2012", 1000, "JPEG", ((80, 60), (70, 90), (64, 64))),
    ("cifar10", 10, "PNG", ((32, 32),)),
  ):
    directory = root / name / "5.1.0"
    test = "validation" if name == "imagenet2012" else "test"
    shards.write_metadata(directory, name, {"train": [16], test: [10]}, classes=classes)
    for split, count in (("train", 16), (test, 10)):
      payloads = []
      for i in range(count):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(sizes[i % len(sizes)], Image.BICUBIC).save(out, kind)
        payloads.append(shards.example(image=out.getvalue(), label=int(rng.integers(classes)), file_name=b"x"))
      shards.write_shard(directory / f"{name}-{split}.tfrecord-00000-of-00001", payloads)
  return root


@pytest.mark.parametrize(
  "file, argument", [("nfnet", "F0"), ("nf_resnet", "50"), ("nf_regnet", "B0"), ("resnet", "50"), ("cifar10", "norm=none")]
)
def test_two_real_steps(datasets, tmp_path, file, argument):
  """The recipe is as it ships but for its size: two stages of one block, small images, batches of 8 (1 for each of 8 devices)."""
  config = get(file, argument)
  small = {} if file == "cifar10" else {"image_size": 48, "test_image_size": 48}
  overrides = {"depth": (1, 1), "width": (64, 128), "stage_strides": (1, 2)}
  config = dataclasses.replace(
    config,
    batch=8,
    eval_batch=8,
    epochs=1,
    log_every=1,
    model=dataclasses.replace(config.model, overrides=overrides),
    data=dataclasses.replace(config.data, dir=str(datasets), index_dir=str(tmp_path / "index"), **small),
    optim=dataclasses.replace(config.optim, warmup_epochs=0.5),
  )
  result = loop.train(config, str(tmp_path))
  assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "prefetch", "bucket"))]
  assert result.finished and result.step == 2 and result.results["params"]["count"] == 10
  losses = [record["loss"] for record in read_jsonl(tmp_path / "metrics.jsonl") if record["kind"] == "train"]
  assert len(losses) == 2 and np.isfinite(losses).all()
  assert all(0 <= record["data_wait"] <= 1 for record in read_jsonl(tmp_path / "metrics.jsonl") if record["kind"] == "train")


# ---- one's own photographs


@pytest.fixture
def photos(tmp_path):
  """20 JPEGs of each of two classes, without train/ and val/."""
  rng = np.random.default_rng(0)
  for name in ("ant", "bee"):
    (tmp_path / "photos" / name).mkdir(parents=True)
    for number in range(20):
      image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((60, 40), Image.BICUBIC)
      image.save(tmp_path / "photos" / name / f"{number:02}.jpg")
  return tmp_path / "photos"


def photos_config(photos, argument: str, **data) -> Config:
  """The recipe on a directory, with a smaller network."""
  config = get("folder", argument)
  config.model.overrides = {
    "depth": (1, 1),
    "width": (16, 16),
    "group_width": 8,
    "stage_strides": (1, 2),
    "stem_width": (4, 4, 8),
  }
  config.data = dataclasses.replace(config.data, dir=str(photos), **data)
  return config


def test_the_folder_recipe_needs_a_directory_alone_and_resumes_on_the_same_photographs(photos, tmp_path, capfd):
  config = photos_config(photos, "nfnet_tiny,bs=8,epochs=1")
  workdir = str(tmp_path / "run")
  result = loop.train(config, workdir)
  said = re.findall(
    r"no train/ and val/ in .*: about 10 % of each class \((\d+) of 40 images\) are for val", capfd.readouterr().out
  )
  count = result.results["params"]["count"]
  assert result.finished and [count] == [int(number) for number in said] and 2 <= count <= 10
  assert result.step == round((40 - count) / 8)
  with pytest.raises(UserError, match=r"another configuration: config.data.validation was 0.1, is 0.5"):
    loop.train(photos_config(photos, "nfnet_tiny,bs=8,epochs=1", validation=0.5), workdir)
  for number in range(20, 30):  # more than the tenth that would all be for validation
    (photos / f"ant/{number}.jpg").write_bytes((photos / "ant/00.jpg").read_bytes())
  with pytest.raises(UserError, match=rf"saw other data: training images {40 - count}, now \d+;"):
    loop.train(config, workdir)


def test_a_batch_of_more_than_all_photographs_is_refused(photos, tmp_path):
  with pytest.raises(
    UserError, match=r"config.batch=64 is more than the 3\d images of folder train; expected at most 3\d \(.*bs=N"
  ):
    loop.train(photos_config(photos, "nfnet_tiny,bs=64"), str(tmp_path / "run"))
