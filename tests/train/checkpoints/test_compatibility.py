"""A continued run must find what its checkpoint was written with: configuration, images, their order and devices."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest

from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.train import loop
from nfnets.train.checkpoints.compatibility import (
  RunFacts,
  check_same_data,
  check_same_order,
  check_same_run,
  random_numbers,
  to_json,
)
from nfnets.train.checkpoints.errors import CheckpointError
from nfnets.train.checkpoints.reader import CheckpointReader

pytestmark = pytest.mark.usefixtures("two_devices")
NAMES = tuple("abcdefghij")
FACTS = RunFacts(config=Config(), class_names=NAMES, records=1000, fingerprint="0123456789abcdef")
OLD = pathlib.Path(__file__).parent / "written_before_the_rooms"


def meta(**data) -> dict:
  return {"data": {"records": 1000, **data}, "num_classes": 10, "rng": random_numbers(Config()), "versions": {"numpy": "1.26.4"}}


@pytest.mark.parametrize(
  "before, now, message",
  [
    (
      {},
      {"records": 999, "class_names": (*NAMES, "k")},
      "runs/a saw other data: training images 1000, now 999; classes 10, now 11",
    ),
    ({"shuffle_block": 32}, {}, "config.data.shuffle_block .* 32, now 1"),
    ({"rows": 256}, {"rows_normalized": 64}, "images normalized together .* 256, now 64"),
    ({"ascent_rows": 32}, {"rows_ascended": 16}, "ascent of SAM is taken on .* 32, now 16"),
    ({"class_names": ["x", *NAMES[1:]]}, {}, "saw other data: class 0 was 'x', is 'a'; take"),
    ({"class_names": [*NAMES[::-1]]}, {}, "the same classes in another order: class 0 was 'j', is 'a' .and 9 more."),
    ({"class_names": ["x"]}, {}, "classes 1, now 10"),
    (
      {"fingerprint": "fedcba9876543210"},
      {},
      "files of other names or lengths .fingerprint fedcba9876543210, now 0123456789abcdef",
    ),
  ],
)
def test_other_data_are_refused_naming_what_differs(before, now, message):
  with pytest.raises(CheckpointError, match=message):
    check_same_data(meta(**before), dataclasses.replace(FACTS, **now), "runs/a")


def test_what_an_older_nfnets_did_not_note_is_not_compared():
  check_same_data(meta(), dataclasses.replace(FACTS, shuffle_block=32, rows_normalized=8, rows_ascended=4), "runs/a")
  check_same_order(meta(), "0123456789abcdef", "runs/a")


def test_another_order_of_the_images_is_refused_naming_the_versions_of_numpy():
  check_same_order(meta(order_digest="0123456789abcdef"), "0123456789abcdef", "runs/a")
  with pytest.raises(CheckpointError, match=f"in another order .* NumPy was 1.26.4, is {np.__version__}"):
    check_same_order(meta(order_digest="0123456789abcdef"), "fedcba9876543210", "runs/a")


def test_other_configurations_are_refused_and_what_changes_nothing_is_not():
  harmless = Config(
    accumulate=2,
    shard=True,
    keep_every=1.0,
    keep_best="top1",
    on_bad_step="skip",
    spike=3.0,
    max_bad_steps=2,
    watchdog=1.0,
    keep_checkpoints=1,
  )
  check_same_run(to_json(Config()), harmless, "runs/a")
  with pytest.raises(CheckpointError, match="config.batch was 256, is 128"):
    check_same_run(to_json(Config()), Config(batch=128), "runs/a")


def test_a_run_can_be_prolonged_and_not_shortened():
  check_same_run(to_json(Config(epochs=10)), Config(epochs=12.5), "runs/a")
  with pytest.raises(CheckpointError, match="config.epochs was 10, is 5"):
    check_same_run(to_json(Config(epochs=10)), Config(epochs=5), "runs/a")


def old_config() -> Config:
  """Makes the recipe of the run in OLD, which has 11 steps and was stopped after 7 of them."""
  small = {
    "width": (8, 8),
    "group_width": 4,
    "stem_width": (2, 2, 4),
    "stem_strides": (1, 1, 1, 2),
    "stage_strides": (1, 2),
    "depth": (1, 1),
  }
  return Config(
    model=ModelConfig(name="nfnet_tiny", drop_rate=0.2, stochastic_depth=0.2, overrides=small),
    data=DataConfig(name="digits", shift=1),
    optim=OptimConfig(base_lr=0.4, warmup_epochs=0.25, clipping=0.05, agc_track=True, ema_decay=0.9),
    batch=128,
    accumulate=2,
    eval_batch=360,
    epochs=1,
    log_every=2,
    eval_every=0.5,
    checkpoint_every=1,
  )


def test_a_run_of_before_the_rooms_goes_on(tmp_path):
  """Goes on from a checkpoint that commit c00e4ff wrote with jax 0.10.2; `end.npz` holds that commit's weights without a stop."""
  workdir = shutil.copytree(OLD, tmp_path / "run")
  result = loop.train(old_config(), str(workdir))
  assert result.finished and result.step == 11
  weights = CheckpointReader(str(workdir)).restore_weights(11)
  with np.load(OLD / "end.npz") as expected:
    assert set(expected.files) == set(weights)
    for path in expected.files:
      np.testing.assert_allclose(weights[path], expected[path], rtol=1e-4, atol=1e-5, err_msg=path)
  assert jax.tree.leaves(weights)
