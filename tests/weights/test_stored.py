"""Files of weights: what an export holds comes back, and what does not fit is refused in one line."""

import json

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from nfnets import models
from nfnets.agc import named_leaves
from nfnets.config import Config, ModelConfig
from nfnets.errors import UserError
from nfnets.train.checkpoints.compatibility import to_json
from nfnets.weights.errors import WeightsError
from nfnets.weights.network import build, fill
from nfnets.weights.reader import read

ENDLESS = {"depth": [10**9], "width": [16], "stage_strides": [1]}
TINY = {"width": (16,), "depth": (1,), "stage_strides": (1,)}
CONFIG = Config(model=ModelConfig(name="nf_resnet_tiny", overrides=TINY))
PREPROCESSING = {"crop": "squash", "size": 32, "interpolation": "bicubic", "mean": [1, 2, 3], "std": [4, 5, 6]}


def network_and_arrays(seed: int = 3):
  network = models.create("nf_resnet_tiny", 4, rngs=seed, **TINY)
  return network, {name: np.asarray(leaf) for name, leaf, _ in named_leaves(nnx.state(network, nnx.Param))}


def write(path, arrays, **changes):
  metadata = {
    "format": "nfnets",
    "config": to_json(CONFIG),
    "num_classes": 4,
    "class_names": [*"abcd"],
    "preprocessing": PREPROCESSING,
  }
  metadata = {key: value for key, value in (metadata | changes).items() if value is not None}
  safetensors.numpy.save_file(
    arrays, path, {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
  )


def test_what_was_written_is_the_network_that_is_built(tmp_path):
  network, arrays = network_and_arrays()
  write(tmp_path / "x.safetensors", arrays)
  stored = read(tmp_path / "x.safetensors")
  assert stored.class_names == tuple("abcd") and stored.preprocessing.test_image_size == 32
  images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
  np.testing.assert_array_equal(build(stored)(images), network(images))


def test_a_new_classifier_is_drawn_when_asked_for_and_all_else_is_kept(tmp_path):
  network, arrays = network_and_arrays()
  write(tmp_path / "x.safetensors", arrays)
  built = build(read(tmp_path / "x.safetensors"), num_classes=7)
  images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
  assert built(images).shape == (2, 7)
  np.testing.assert_array_equal(built.outputs(images)["pool"], network.outputs(images)["pool"])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda arrays: arrays.pop("fc/kernel"), r"fc/kernel .* is missing"),
    (lambda arrays: arrays.update({"fc/extra": np.zeros(3, np.float32)}), r"fc/extra \(3,\) is left over"),
    (lambda arrays: arrays.update({"fc/bias": np.zeros(5, np.float32)}), r"fc/bias is \(5,\), expected \(4,\)"),
    (lambda arrays: arrays.update({"fc/bias": np.zeros(4, np.int32)}), "fc/bias is int32, expected numbers with a fraction"),
  ],
)
def test_every_array_finds_its_place_or_is_named(change, message):
  network, arrays = network_and_arrays()
  change(arrays)
  with pytest.raises(WeightsError, match=f"a file holds another network: .*{message}"):
    fill(nnx.state(network, nnx.Param), arrays, "a file")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"format": "pt"}, "names of no framework known here"),
    ({"config": None}, "have no config that can be read"),
    ({"config": "[" * 100_000}, "have no config that can be read"),
    ({"config": "[1]"}, "config is list, expected dict"),
    ({"config": {"model": 5}}, "config"),
    ({"config": {"model": {"name": "nf_resnet_tiny", "dtype": [1]}}}, "dtype"),
    ({"config": {"data": {"mean": "x"}}}, "mean"),
    ({"num_classes": "true"}, "num_classes is bool, expected int"),
    ({"class_names": ["a"]}, "class_names has 1 entries, expected 4 names"),
    ({"class_names": [1, 2, 3, 4]}, "class_names has 4 entries, expected 4 names"),
    ({"preprocessing": {"crop": "squash"}}, "lacks mean, size, std"),
    ({"preprocessing": PREPROCESSING | {"crop": "zoom"}}, "test_crop"),
    ({"preprocessing": PREPROCESSING | {"mean": 5}}, "mean and std must be lists"),
    ({"preprocessing": PREPROCESSING | {"size": -1}}, "test_image_size"),
    ({"config": {"model": {"name": "nf_resnet_tiny", "overrides": ENDLESS}}}, "fewer than"),
    ({"config": {"model": {"name": "no such"}}}, "unknown model"),
  ],
)
def test_metadata_of_anyone_are_one_line(tmp_path, changes, message):
  write(tmp_path / "x.safetensors", network_and_arrays()[1], **changes)
  with pytest.raises(UserError, match=message):
    build(read(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
  "content", [b"", b"<html>", b"\xff" * 100, b"\x00" * 7, (2**62).to_bytes(8, "little") + b"{}", b"\x80\x04cos\nsystem"]
)
def test_a_file_that_is_none_of_ours_is_one_line(tmp_path, content):
  (tmp_path / "x.safetensors").write_bytes(content)
  with pytest.raises(WeightsError, match="x.safetensors (is|cannot be)"):
    read(tmp_path / "x.safetensors")
