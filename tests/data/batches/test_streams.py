"""The random streams never change: hashes of batches of undecoded arrays equal those of the first version."""

import contextlib
import dataclasses
import hashlib

import chex
import numpy as np
import pytest

from nfnets.config import DataConfig
from nfnets.data.batches.training import TrainBatches
from nfnets.data.sources.base import ArraySource

PLAIN = DataConfig(shift=2, flip=True, threads=2)
RANDAUGMENT = {"augment": "randaugment", "randaugment_layers": 2, "randaugment_magnitude": 5}

SETTINGS = {
  "plain": {},
  "randaugment": RANDAUGMENT,
  "repeats": {"repeats": 2, "augment": "autoaugment"},
  "blocks": {"shuffle_block": 4},
  "cutmix": {"mix": "cutmix", **RANDAUGMENT},
  "cutmix, augmented before": {"mix": "cutmix", "augment_before_mix": True, **RANDAUGMENT},
  "cutmix, second": {"mix": "cutmix", "mix_with": "second", "augment": "autoaugment"},
  "cutmix, second, augmented before": {"mix": "cutmix", "mix_with": "second", "augment_before_mix": True, **RANDAUGMENT},
  "cutmix, second, repeats": {"mix": "cutmix", "mix_with": "second", "repeats": 3, **RANDAUGMENT},
  "mixup": {"mix": "mixup", **RANDAUGMENT},
  "mixup_cutmix, second, repeats, blocks": {"mix": "mixup_cutmix", "mix_with": "second", "repeats": 2, "shuffle_block": 3},
}
EXPECTED = {
  "plain": "cea59a6d7a3609cd",
  "randaugment": "af05f9d551d23a19",
  "repeats": "4b95ee3fdcbb920a",
  "blocks": "f0ee440dc4e467d3",
  "cutmix": "e324d6c271e0e465",
  "cutmix, augmented before": "e192260d79607b1b",
  "cutmix, second": "9dc3767f25ac9053",
  "cutmix, second, augmented before": "877adb85847fb52a",
  "cutmix, second, repeats": "26898703f88443ad",
  "mixup": "2418ffe12b22d456",
  "mixup_cutmix, second, repeats, blocks": "6014d0ae94e32185",
}


def source(n: int = 50, size: int = 12) -> ArraySource:
  """Images of noise; the label is the number of the record."""
  images = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)
  return ArraySource("noise", "train", [*map(str, range(n))], images, np.arange(n))


def digest(changes: dict) -> str:
  """Returns 16 hex digits of three batches: two within the first epoch, and one that goes beyond its end.

  The images of mixup are left out, because the last bit of a weighted sum may differ between processors; its labels and
  ratios are included.
  """
  batches = TrainBatches(source(), dataclasses.replace(PLAIN, **changes), batch=24, seed=7)
  names = [name for name in ("image", "label", "mix_label", "ratio") if name != "image" or "mixup" not in changes.get("mix", "")]
  with contextlib.closing(batches):
    steps = [batches[step] for step in (0, 1, 2)]
  return hashlib.sha256(b"".join(step[name].tobytes() for step in steps for name in names if name in step)).hexdigest()[:16]


@pytest.mark.parametrize("name", SETTINGS)
def test_batches_are_those_of_the_first_version(name):
  assert digest(SETTINGS[name]) == EXPECTED[name]


@pytest.mark.parametrize("mix_with", ["batch", "second"])
def test_the_order_digest_is_of_the_next_epoch_and_leaves_the_kept_epochs(mix_with):
  batches = TrainBatches(source(), dataclasses.replace(PLAIN, mix="cutmix", mix_with=mix_with), batch=24, seed=7)
  first = batches[0]
  epochs = list(batches._order._epochs)
  digests = [batches.order_digest(step) for step in range(6)]
  assert list(batches._order._epochs) == epochs
  orders = [batches._order, batches._partners] if mix_with == "second" else [batches._order]
  next_epoch = b"".join(order[1].astype("<i4").tobytes() for order in orders)
  assert digests[0] == hashlib.sha256(next_epoch).hexdigest()[:16]
  # 50 records, 24 a step: steps 0 to 2 begin in epoch 0, 3 and 4 in epoch 1, 5 in epoch 2
  assert digests[0] == digests[1] == digests[2] != digests[3] == digests[4] != digests[5]
  chex.assert_trees_all_equal(batches[0], first)
  batches.close()
