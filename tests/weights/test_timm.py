"""timm's names, layout and arithmetic against timm itself: golden/README.md says how tests/golden/timm.npz was computed."""

import functools
import json
import math

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from nfnets import models
from nfnets.agc import named_leaves
from nfnets.errors import UserError
from nfnets.train.initial import read_weights
from nfnets.weights import timm
from nfnets.weights.errors import WeightsError
from nfnets.weights.network import build, fill
from nfnets.weights.reader import read
from tests import golden

WITH_OUTPUTS = ["test_nfnet", "nf_resnet26", "nf_seresnet26", "nf_regnet_b0"]


@functools.cache
def theirs(name: str) -> dict[str, tuple[int, ...]]:
  """The names and shapes of timm's state_dict, for 10 classes."""
  lines = str(golden.load("timm")[f"{name}/names"]).split("\n")
  return {line.split()[0]: tuple(map(int, line.split()[1:])) for line in lines}


def numbered(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  return {
    key: np.arange(i, i + math.prod(shape), dtype=np.float32).reshape(shape) for i, (key, shape) in enumerate(shapes.items())
  }


@pytest.mark.parametrize("name", [*WITH_OUTPUTS, "dm_nfnet_f0"])
def test_there_and_back_is_equal_to_the_bit(tmp_path, name):
  arrays = numbered(theirs(name))
  safetensors.numpy.save_file(arrays, tmp_path / "x")
  stored = read(tmp_path / "x")
  known, model = timm.ARCHITECTURES[name], stored.config.model
  assert (model.name, model.overrides, stored.num_classes) == (known.name, known.overrides, 10)
  assert stored.config.data.test_crop == ("squash" if name.startswith("dm_") else "short_side")
  back = timm.to_theirs(stored.arrays, models.variant(model.name).depth, gate_inside="regnet" in name)
  assert {key: array.shape for key, array in back.items()} == theirs(name)
  for key, array in arrays.items():
    np.testing.assert_array_equal(back[key], array)


@pytest.mark.parametrize("name", WITH_OUTPUTS)
def test_outputs_are_timms(tmp_path, name):
  ours, unknown = timm.to_ours(numbered(theirs(name)))
  assert not unknown
  filled = golden.fill_all({key: array.shape for key, array in ours.items()})
  depth = models.variant(timm.ARCHITECTURES[name].name).depth
  safetensors.numpy.save_file(timm.to_theirs(filled, depth, gate_inside="regnet" in name), tmp_path / "x")
  outputs = nnx.jit(lambda network, images: network.outputs(images))(build(read(tmp_path / "x")), golden.images(72))
  for kind, width in (("pool", 64), ("logits", 10)):
    expected = golden.load("timm")[f"{name}/{kind}"]
    assert np.linalg.norm(outputs[kind][:, :width] - expected) < 1e-4 * np.linalg.norm(expected)


def test_outputs_of_dm_nfnet_are_timms():
  """The numbers in nfnet_f0.npz are of timm's dm_nfnet_f0 on the weights of nfnet_f0."""
  known = timm.ARCHITECTURES["dm_nfnet_f0"]
  network = nnx.eval_shape(lambda: models.create(known.name, 1000, **known.overrides))
  graph, state = nnx.split(network)
  filled = golden.fill_all({path: leaf.shape for path, leaf, _ in named_leaves(state)})
  logits = nnx.jit(lambda network, images: network(images))(nnx.merge(graph, fill(state, filled, "golden")), golden.images(72))
  expected = golden.load("nfnet_f0")["timm_dm_logits"]
  assert np.linalg.norm(logits[:, : expected.shape[1]] - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", timm.ARCHITECTURES)
def test_every_architecture_is_a_network_of_its_own(name):
  """No two of the table are the same."""
  known = timm.ARCHITECTURES[name]
  row = models.variant(known.name, **known.overrides)
  same = [other for other, each in timm.ARCHITECTURES.items() if models.variant(each.name, **each.overrides) == row]
  assert same == [name]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda a: a.pop("stages.0.0.conv1.gain"), r"blocks/0/conv0/gain \(8,\) is missing"),
    (
      lambda a: a.update({"stages.0.0.bn.weight": np.ones(3)}),
      "left over, since no network of timm's has them: stages.0.0.bn.weight",
    ),
    (lambda a: a.update({"head.norm.weight": np.ones(3)}), "left over.*head.norm.weight"),
    (lambda a: a.update({"stages.0.0.conv1.gain": np.ones(8)}), "left over.*stages.0.0.conv1.gain"),
    (lambda a: a.update({"stages.0.0.attn_last.fc1.weight": np.ones((8, 32, 2, 2))}), "left over.*attn_last.fc1.weight"),
    (lambda a: a.update({"head.fc.weight": np.ones((10, 3, 1, 1))}), "left over.*head.fc.weight"),
    (lambda a: a.update({"stages.0.0.skipinit_gain": np.ones(())}), "nearest to|no network known here"),
    (lambda a: a.update({"head.fc.bias": np.full(10, np.inf)}), "fc/bias holds 10 numbers of 10 that are NaN or infinite"),
    (lambda a: [a.pop(key) for key in list(a) if key.startswith("head")], "has no classifier"),
    (lambda a: [a.pop(key) for key in list(a) if key.startswith("stages.3")], "as no network known here has"),
    (lambda a: a.update({"stages.1.0.conv1.weight": np.ones((16, 31, 1, 1))}), r"blocks/1/conv0/kernel is \(1, 1, 31, 16\)"),
  ],
)
def test_what_does_not_fit_is_one_line(tmp_path, change, message):
  arrays = numbered(theirs("test_nfnet"))
  change(arrays)
  safetensors.numpy.save_file({key: np.asarray(value, np.float32) for key, value in arrays.items()}, tmp_path / "x")
  with pytest.raises(UserError, match=message) as refused:
    read(tmp_path / "x")
  assert "\n" not in str(refused.value)


def config_json(**changes) -> dict:
  shown = {"input_size": [3, 96, 96], "crop_pct": 0.8, "crop_mode": "squash", "interpolation": "bicubic"}
  cfg = {**shown, "mean": [0.5] * 3, "std": [0.25] * 3, **changes}
  return {"architecture": "nf_resnet26", "label_names": list("abcdefghij"), "pretrained_cfg": cfg}


def test_the_config_json_beside_the_weights_says_how_images_are_shown(tmp_path):
  safetensors.numpy.save_file(numbered(theirs("nf_resnet26")), tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps(config_json()))
  stored = read_weights(tmp_path)
  data = stored.config.data
  assert (data.test_crop, data.test_crop_pct, data.test_resize, data.test_image_size) == ("squash", 0.8, "pillow", 96)
  assert (data.mean, data.std, stored.class_names) == ((127.5,) * 3, (63.75,) * 3, tuple("abcdefghij"))
  (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"test_input_size": [3, 64, 64]}}))
  assert read_weights(tmp_path).config.data.test_image_size == 64
  assert read_weights(tmp_path).config.data.test_crop_pct == 0.94  # as the architecture's table says


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "is no config.json of timm"),
    ("[]", "is no config.json of timm"),
    ('{"pretrained_cfg": {"mean": [1' + "0" * 400 + "]}}", "is no config.json of timm"),
    ('{"pretrained_cfg": {"input_size": [3, [1], 8]}}', "is no config.json of timm"),
    (json.dumps(config_json(crop_mode="border")), "asks for crop_mode='border'"),
    (json.dumps(config_json(interpolation="bilinear")), "and interpolation='bilinear'"),
    (json.dumps(config_json(input_size=[3, 96, 64])), "'bicubic' of squares"),
    (json.dumps(config_json(crop_pct=0)), "test_crop_pct"),
    (json.dumps(config_json() | {"label_names": ["a"]}), "label_names has 1 entries, expected the names of 10 classes"),
  ],
)
def test_a_config_json_that_does_not_fit_is_one_line(tmp_path, content, message):
  safetensors.numpy.save_file(numbered(theirs("nf_resnet26")), tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text(content)
  with pytest.raises(WeightsError, match=message) as refused:
    read_weights(tmp_path)
  assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_pth_is_read_where_torch_is_installed(tmp_path):
  torch = pytest.importorskip("torch")
  arrays = numbered(theirs("test_nfnet"))
  tensors = {key: torch.tensor(array) for key, array in arrays.items()}
  for form in ({"state_dict": tensors, "epoch": 3}, {f"module.{key}": tensor for key, tensor in tensors.items()}):
    for new in (True, False):
      torch.save(form, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
      np.testing.assert_array_equal(read(tmp_path / "x.pth").arrays["fc/kernel"], arrays["head.fc.weight"].T)
  torch.save({**tensors, "head.fc.bias": torch.zeros(1).expand(10**9)}, tmp_path / "x.pth")
  with pytest.raises(UserError, match="larger than the file"):
    read(tmp_path / "x.pth")
  torch.save({"a": pytest.raises}, tmp_path / "x.pth")
  with pytest.raises(UserError, match="nothing was run"):
    read(tmp_path / "x.pth")
