"""Haiku's names and ours: one list of theirs for each family, and the way there and back, equal to the bit."""

import functools
import hashlib
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from nfnets import models
from nfnets.agc import named_leaves
from nfnets.errors import UserError
from nfnets.weights import formats, haiku
from nfnets.weights.network import build
from nfnets.weights.reader import read
from tests import golden

# Written down from the modules that the release's networks make (dm-haiku 0.0.17): some names of theirs and their shapes.
THEIRS = {
  ("NFNet", "nfnet_f0"): {
    "NFNet/~/stem_conv0/w": (3, 3, 3, 16),
    "NFNet/~/nf_block/skip_gain": (),
    "NFNet/~/nf_block_9/~/conv_shortcut/gain": (1536,),
    "NFNet/~/nf_block_11/~/conv1b/w": (3, 3, 128, 768),
    "NFNet/~/nf_block_8/~/squeeze_excite/~/linear/w": (1536, 768),
    "NFNet/~/nf_block_8/~/squeeze_excite/~/linear_1/b": (1536,),
    "NFNet/~/final_conv/bias": (3072,),
    "NFNet/~/linear/b": (10,),
  },
  ("NF_ResNet", "nf_resnet50"): {
    "NF_ResNet/~/initial_conv/gain": (64,),
    "NF_ResNet/~/nf_res_block_7/~/conv_shortcut/w": (1, 1, 512, 1024),
    "NF_ResNet/~/nf_res_block_15/skip_gain": (),
    "NF_ResNet/~/linear/w": (2048, 10),
  },
  ("NF_RegNet", "nf_regnet_b0"): {
    "NF_RegNet/~/initial_conv/w": (3, 3, 3, 36),
    "NF_RegNet/~/nf_block_1/~/conv1/w": (3, 3, 8, 80),
    "NF_RegNet/~/nf_block_8/~/squeeze_excite/~/linear/b": (172,),
    "NF_RegNet/~/final_conv/w": (1, 1, 330, 960),
  },
  ("SkipInit_ResNet", "skipinit_resnet50"): {
    "SkipInit_ResNet/~/initial_conv/w": (7, 7, 3, 64),
    "SkipInit_ResNet/~/nf_res_block/~/conv0/b": (64,),
    "SkipInit_ResNet/~/nf_res_block_3/skip_gain": (),
  },
  ("FixUp_ResNet", "fixup_resnet50"): {
    "FixUp_ResNet/bias1": (),
    "FixUp_ResNet/~/res_block_10/bias3b": (),
    "FixUp_ResNet/~/res_block/scale": (),
    "FixUp_ResNet/~/res_block_1/~/conv0/w": (1, 1, 256, 64),
  },
  ("ResNet", "resnet50"): {
    "ResNet/~/final_bn/offset": (1, 1, 1, 2048),
    "ResNet/~/final_bn/~/mean_ema/average": (1, 1, 1, 2048),
    "ResNet/~/res_block_v2/~/bn0/scale": (1, 1, 1, 64),
    "ResNet/~/res_block_v2_9/~/bn1/~/var_ema/hidden": (1, 1, 1, 256),
    "ResNet/~/res_block_v2_9/~/bn1/~/var_ema/counter": (),
    "ResNet/~/res_block_v2_9/~/conv2/w": (1, 1, 256, 1024),
  },
}
MODULES = {"nfnet_f0": 94, "nf_resnet50": 70, "nf_regnet_b0": 103, "skipinit_resnet50": 70, "fixup_resnet50": 71, "resnet50": 201}


def arrays_of(name: str, num_classes: int = 10) -> dict[str, np.ndarray]:
  state = nnx.state(nnx.eval_shape(lambda: models.create(name, num_classes)), nnx.Any(nnx.Param, nnx.BatchStat))
  return {
    path: np.arange(i, i + leaf.size, dtype=np.float32).reshape(leaf.shape)
    for i, (path, leaf, _) in enumerate(named_leaves(state))
  }


@pytest.mark.parametrize(("network", "name"), THEIRS, ids=str)
def test_names_are_theirs_and_the_network_is_told_from_them(tmp_path, network, name):
  ours = arrays_of(name)
  modules = haiku.to_theirs(ours, network)
  theirs = formats.flat(modules)
  assert len(modules) == MODULES[name]
  assert {key: theirs[key].shape for key in THEIRS[network, name]} == THEIRS[network, name]
  (tmp_path / "x.npz").write_bytes(pickle.dumps(modules))
  stored = read(tmp_path / "x.npz")
  assert (stored.config.model.name, stored.config.model.overrides, stored.num_classes) == (name, {}, 10)
  assert stored.arrays.keys() == ours.keys()
  for key, array in ours.items():
    np.testing.assert_array_equal(stored.arrays[key], array)


def test_outputs_of_haikus_weights_are_the_releases(tmp_path):
  """The golden values are outputs of the release on these weights."""
  shapes = {name: array.shape for name, array in arrays_of("nf_regnet_b0").items()}
  (tmp_path / "x.npz").write_bytes(pickle.dumps(haiku.to_theirs(golden.fill_all(shapes), "NF_RegNet")))
  expected = golden.load("nf_regnet_b0")
  logits = nnx.jit(lambda network, images: network(images))(build(read(tmp_path / "x.npz")), golden.images(72))
  assert np.linalg.norm(logits - expected["logits"]) < 1e-4 * np.linalg.norm(expected["logits"])


def test_a_published_file_is_named(tmp_path, monkeypatch):
  content = pickle.dumps(haiku.to_theirs(small(), "NF_ResNet"))
  monkeypatch.setitem(haiku.PUBLISHED, hashlib.md5(content, usedforsecurity=False).hexdigest(), "nfnet_f3")
  (tmp_path / "x.npz").write_bytes(content)
  assert read(tmp_path / "x.npz").source.endswith("x.npz (the published nfnet_f3, by its MD5 sum)")


@functools.cache
def small() -> dict[str, np.ndarray]:
  return arrays_of("nf_resnet26", 3)


def tiny() -> dict[str, np.ndarray]:
  return formats.flat(haiku.to_theirs(small(), "NF_ResNet"))


def as_pickle(arrays, path):
  path.write_bytes(pickle.dumps(arrays))


def as_npz(arrays, path):
  with open(path, "wb") as file:  # given a name, np.savez adds .npz
    np.savez(file, **arrays)


def as_compressed_npz(arrays, path):
  """As np.savez_compressed, at zlib's lowest level, which takes a fraction of the time."""
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
    for name, array in arrays.items():
      with file.open(f"{name}.npy", "w") as entry:
        np.lib.format.write_array(entry, np.asarray(array))


WRITERS = {
  "npz": as_npz,
  "compressed npz": as_compressed_npz,
  "safetensors": lambda arrays, path: safetensors.numpy.save_file(
    {name: np.asarray(array) for name, array in arrays.items()}, path
  ),
  "flat pickle": as_pickle,
  "dotted": lambda arrays, path: as_pickle({name.replace("/~/", ".").replace("/", "."): a for name, a in arrays.items()}, path),
  "params of a checkpoint": lambda arrays, path: as_pickle({"params": arrays}, path),
}


@pytest.mark.parametrize("form", WRITERS)
def test_flat_names_are_read_from_every_format(tmp_path, form):
  WRITERS[form](tiny(), tmp_path / "x")
  stored = read(tmp_path / "x")
  assert stored.config.model.name == "nf_resnet26"
  for name, array in small().items():
    np.testing.assert_array_equal(stored.arrays[name], array)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda a: a.pop("NF_ResNet/~/nf_res_block/~/conv0/gain"),
      r"nearest to nf_resnet26, but blocks/0/conv0/gain \(64,\) is missing",
    ),
    (lambda a: a.update({"NF_ResNet/~/nf_res_block/~/conv9/gain": np.ones(3)}), r"blocks/0/conv9/gain \(3,\) is left over"),
    (lambda a: a.update({"NF_ResNet/~/other/w": np.ones(3)}), "left over, since no NF_ResNet has them: NF_ResNet/~/other/w"),
    (lambda a: a.update({"NF_ResNet.linear.b": np.ones(3)}), "left over.*NF_ResNet.linear.b"),
    (lambda a: a.update({"NF_ResNet/~/linear/b": np.ones(4, np.float32)}), r"fc/bias is \(4,\), expected \(3,\)"),
    (lambda a: a.update({"NF_ResNet/~/linear/b": np.full(3, np.nan)}), "fc/bias holds 3 numbers of 3 that are NaN or infinite"),
    (lambda a: a.pop("NF_ResNet/~/linear/w"), "has no classifier"),
    (lambda a: a.pop("NF_ResNet/~/nf_res_block_1/~/conv0/w"), "as no network known here has|nearest to"),
    (lambda a: a.update({"Another/~/linear/b": np.ones(3)}), "names of no framework known here"),
    (lambda a: a.update({"NF_ResNet/~/nf_res_block_99999/~/conv0/w": np.ones(3)}), "blocks/99999/conv0/kernel .* is left over"),
    (lambda a: a.update({"NF_ResNet/~/linear/b": np.array(["a"])}), "expected one of float16|expected numbers"),
  ],
)
def test_what_does_not_fit_is_one_line(tmp_path, change, message):
  arrays = tiny()
  change(arrays)
  np.savez(tmp_path / "x.npz", **arrays)
  with pytest.raises(UserError, match=message) as refused:
    read(tmp_path / "x.npz")
  assert "\n" not in str(refused.value)
