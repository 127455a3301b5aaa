"""A run goes on where images cannot be decoded, which are counted and replaced, and where storage fails, which is tried again."""

import dataclasses
import io
import random
import time

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import register_implementation
from PIL import Image

from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.data.storage import remote
from nfnets.train import loop
from nfnets.train.logs.logbook import read_jsonl
from tests import shards
from tests.data.images import fuzz
from tests.faults import data_faults
from tests.faults.recipe import SMALL

pytestmark = pytest.mark.usefixtures("two_devices")
IMAGES = 400
BROKEN = {37: "cut short", 111: "empty", 222: "no image at all", 333: "corrupt"}


class Failing(MemoryFileSystem):
  """A memory:// file system in which every fifth read fails and every tenth stalls for a while."""

  protocol = "failing"
  cachable = False
  rng, failed, stalled = random.Random(0), 0, 0

  @classmethod
  def _strip_protocol(cls, path):
    return MemoryFileSystem._strip_protocol(path.replace("failing://", "memory://"))

  def cat_file(self, path, start=None, end=None, **options):
    luck = Failing.rng.random()
    if luck < 0.2:
      Failing.failed += 1
      raise TimeoutError("the storage did not answer")
    if luck < 0.3:
      Failing.stalled += 1
      time.sleep(0.5)
    return super().cat_file(path, start=start, end=end, **options)


register_implementation("failing", Failing, clobber=True)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  """Writes IMAGES JPEGs in four shards as TFDS does, of which those in BROKEN (1 %) cannot be decoded."""
  root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
  for name, broken in (("whole", {}), ("broken", BROKEN)):
    directory = root / name / "1.0.0"
    shards.write_metadata(directory, name, {"train": [100] * 4, "test": [20]}, classes=10)
    for split, count in (("train", IMAGES), ("test", 20)):
      payloads = []
      for i in range(count):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((40, 30), Image.BICUBIC).save(out, "JPEG")
        image = out.getvalue()
        if split == "train" and i in broken:
          image = {
            "cut short": image[: len(image) // 2],
            "empty": b"",
            "no image at all": b"GIF, or so it says",
            "corrupt": image[:2] + bytes(len(image) - 2),
          }[broken[i]]
        payloads.append(shards.example(image=image, label=i % 10, file_name=b"x"))
      for shard in range(count // 100 or 1):
        file = directory / f"{name}-{split}.tfrecord-{shard:05d}-of-{count // 100 or 1:05d}"
        shards.write_shard(file, payloads[shard * 100 : (shard + 1) * 100])
  return root


def make_config(root, name: str) -> Config:
  return Config(
    model=ModelConfig(name="nfnet_tiny", overrides=dict(SMALL)),
    batch=40,
    eval_batch=24,
    epochs=2,
    log_every=5,
    data=DataConfig(
      name=name,
      dir=str(root),
      index_dir=f"{root}/index",
      train_crop="inception",
      test_crop="squash",
      image_size=16,
      test_image_size=16,
      max_corrupt=0.02,
      mix="mixup_cutmix",
      flip=True,
    ),
    optim=OptimConfig(base_lr=0.4, warmup_epochs=0.5, clipping=0.05, ema_decay=0.9),
  )


def test_images_that_cannot_be_decoded_are_counted_exactly(dataset, tmp_path, capfd, row):
  result = loop.train(make_config(dataset, "broken"), str(tmp_path))
  train = [record for record in read_jsonl(tmp_path / "metrics.jsonl") if record["kind"] == "train"]
  assert result.finished and train[-1]["corrupt_records"] == len(BROKEN)
  said = capfd.readouterr().out
  for number in BROKEN:
    assert f"record {number % 100 + 1} of 100" in said
  row(
    f"{len(BROKEN)} of {IMAGES} images (1 %): {', '.join(BROKEN.values())}", f"crashes 0, counted {train[-1]['corrupt_records']}"
  )


def test_a_flipped_bit_of_a_payload_is_always_found(tmp_path, full, row):
  attempts = 200 if full else 30
  flips = data_faults.flip_payload_bits(tmp_path, attempts)
  assert (flips.attempts, flips.named, flips.silent) == (attempts, attempts, 0)
  row(f"1 bit flipped in {attempts} payloads of TFRecord shards", f"{flips.named} found and named", silent=flips.silent)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")  # with which Pillow tells of damaged tags
def test_mutated_images_are_decoded_or_refused(row):
  """The short form is tests/data/images/test_fuzz.py."""
  outcome = fuzz.fuzz(500_000, seed=1)
  row(
    f"{outcome.decoded + outcome.refused:,} mutated images of {len(fuzz.FORMATS)} formats",
    f"decoded {outcome.decoded:,}, refused {outcome.refused:,}, anything else {len(outcome.other)}",
  )
  assert outcome.other == ()


@pytest.mark.long
def test_storage_that_fails_and_stalls_changes_nothing(dataset, tmp_path, monkeypatch, row):
  """Where every fifth read fails and some stall, the losses are the same as from the disk."""
  monkeypatch.setattr(remote, "BLOCK", 4096)  # so that a request gets only a few images
  memory = MemoryFileSystem()
  for file in sorted((dataset / "whole" / "1.0.0").iterdir()):
    memory.pipe_file(f"/faults/whole/1.0.0/{file.name}", file.read_bytes())
  losses, seconds = [], []
  for name, root in (("disk", dataset), ("bucket", "failing://faults")):
    config = make_config(root, "whole")
    config.data = dataclasses.replace(config.data, index_dir=str(tmp_path / "index"), shuffle_block=8)
    begin = time.monotonic()
    assert loop.train(config, str(tmp_path / name)).finished
    seconds.append(time.monotonic() - begin)
    losses.append([record["loss"] for record in read_jsonl(tmp_path / name / "metrics.jsonl")])
  assert losses[0] == losses[1] and Failing.failed >= 10
  row(
    f"storage fails {Failing.failed} times (20 %), stalls {Failing.stalled} times",
    f"tried again, losses equal to the bit; {seconds[1]:.0f} s instead of {seconds[0]:.0f}",
  )
