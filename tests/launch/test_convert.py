"""launch.convert: weights there and back, what stands beside them, and what cannot be in one line with nothing left behind."""

import errno
import json
import pickle
import sys

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from launch import cli, convert
from nfnets import predict
from nfnets.weights import formats, haiku, timm, writer
from nfnets.weights.reader import read
from tests import golden
from tests.export import networks


def call(monkeypatch, *arguments) -> int:
  """Runs the program and returns its exit status."""
  monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
  with pytest.raises(SystemExit) as ended:
    cli.main(convert.run, convert.define, convert.__doc__ or "", arguments=True)
  return int(ended.value.code or 0)


@pytest.fixture
def theirs(tmp_path):
  """A file of timm's test_nfnet, and its arrays."""
  lines = str(golden.load("timm")["test_nfnet/names"]).split("\n")
  draw = np.random.default_rng(0)
  arrays = {line.split()[0]: draw.normal(size=tuple(map(int, line.split()[1:]))).astype(np.float32) for line in lines}
  safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors")
  return tmp_path / "theirs.safetensors", arrays


def test_timms_weights_go_there_and_back_and_open_anywhere(tmp_path, monkeypatch, theirs):
  source, arrays = theirs
  assert call(monkeypatch, source, tmp_path / "ours") == 0
  assert call(monkeypatch, tmp_path / "ours" / "model.safetensors", tmp_path / "back", "--to=timm") == 0
  back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
  assert back.keys() == arrays.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(back[name], array)
  config = json.loads((tmp_path / "back" / "config.json").read_text())
  assert (config["architecture"], config["num_classes"], config["num_features"]) == ("test_nfnet", 10, 192)
  assert config["pretrained_cfg"]["mean"] == [0.5] * 3 and config["pretrained_cfg"]["test_input_size"] == [3, 160, 160]
  with safetensors.safe_open(tmp_path / "ours" / "model.safetensors", "np") as file:
    metadata = file.metadata()
  assert metadata["source"] == "theirs.safetensors" and len(metadata["source_sha256"]) == 64
  for folder in ("ours", "back"):
    assert metadata["source_sha256"] in (tmp_path / "ours" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / folder / "README.md").read_text()
  probabilities = predict.load(tmp_path / "ours")([np.zeros((170, 190, 3), np.uint8)])
  np.testing.assert_array_equal(probabilities, predict.load(source)([np.zeros((170, 190, 3), np.uint8)]))


@pytest.mark.parametrize("name", ["x.npz", "x.pkl", "x.safetensors", "folder"])
def test_haikus_weights_go_there_and_back(tmp_path, monkeypatch, name):
  from tests.weights.test_haiku import arrays_of

  ours = arrays_of("nf_resnet26", 3)
  (tmp_path / "theirs.npz").write_bytes(pickle.dumps(haiku.to_theirs(ours, "NF_ResNet")))
  assert call(monkeypatch, tmp_path / "theirs.npz", tmp_path / name, "--to=haiku") == 0
  written = tmp_path / name / "model.npz" if name == "folder" else tmp_path / name
  first, second = formats.read(tmp_path / "theirs.npz").arrays, formats.read(written).arrays
  assert first.keys() == second.keys()
  for key, array in first.items():
    np.testing.assert_array_equal(second[key], array)


def test_the_releases_weights_become_timms_dm_with_a_remark(tmp_path):
  arrays = {"stem/conv0/kernel": np.zeros((3, 3, 3, 16), np.float32), "blocks/2/skip_gain": np.zeros((), np.float32)}
  config = read_config("nfnet_f0")
  converted = writer.convert(writer.Stored(source="x", arrays=arrays, config=config, num_classes=10), "timm")
  assert (converted.network, [*converted.arrays]) == ("dm_nfnet_f0", ["stem.conv1.weight", "stages.1.1.skipinit_gain"])
  assert "differ" in converted.remark


def read_config(name: str, **overrides):
  from nfnets.config import Config, ModelConfig

  return Config(model=ModelConfig(name=name, overrides=overrides))


@pytest.mark.parametrize(
  ("name", "overrides", "framework"),
  [
    ("nf_resnet50", {}, "timm"),
    ("nfnet_f7", {}, "timm"),
    ("nfnet_f0+", {}, "timm"),
    ("nfnet_f0", {"activation": "silu"}, "timm"),
    ("nfnet_f0", {"activation": "silu", "dialect": "timm_dm"}, "haiku"),
    ("nf_regnet_b6", {"dialect": "timm"}, "timm"),
    ("resnet50", {}, "timm"),
    ("nf_resnet50", {"dialect": "timm"}, "haiku"),
    ("eca_nfnet_l0", {}, "haiku"),
    ("resnet50", {"norm": "group"}, "haiku"),
    ("resnet50", {"norm": "nf"}, "haiku"),
    ("nf_resnet50", {"norm": "batch"}, "haiku"),
    ("resnet50", {"norm": "nf", "activation": "gelu"}, "timm"),
  ],
)
def test_what_a_framework_has_no_equal_of_is_said(name, overrides, framework):
  stored = writer.Stored(source="x", arrays={}, config=read_config(name, **overrides), num_classes=10)
  with pytest.raises(ValueError, match="has no equal of"):
    writer.convert(stored, framework)


@pytest.mark.parametrize("name", timm.ARCHITECTURES)
def test_every_architecture_of_timms_is_found_again(name):
  known = timm.ARCHITECTURES[name]
  stored = writer.Stored(source="x", arrays={}, config=read_config(known.name, **known.overrides), num_classes=10)
  assert writer.convert(stored, "timm").network == name


def test_mistakes_are_one_line_with_status_2_and_leave_nothing(tmp_path, monkeypatch, capsys, theirs):
  source, _ = theirs
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "README.md").write_text("mine")
  mistakes = {
    (source,): "expected SRC and DST",
    (source, tmp_path / "x", "--to=haiku"): "has no equal of",
    (source, tmp_path / "x.npz"): "expected a directory, or a file that ends in .safetensors",
    (source, tmp_path / "no" / "x.safetensors"): "there is no directory",
    (source, tmp_path / "no" / "x"): "there is no directory",
    (source, source / "x"): "there is no directory",
    (source, tmp_path / "full"): "README.md is already there",
    (source, source): "theirs.safetensors is already there",
    (tmp_path / "nowhere", tmp_path / "x"): "is not there",
    (tmp_path, tmp_path / "x"): "no checkpoint there",
  }
  before = sorted(tmp_path.rglob("*"))
  for arguments, message in mistakes.items():
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
  assert (tmp_path / "full" / "README.md").read_text() == "mine"


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, capsys, theirs):
  write_file = writer.write_file

  def fails(path, content):
    if path.suffix == ".safetensors":
      raise OSError(errno.ENOSPC, "No space left on device")
    write_file(path, content)

  monkeypatch.setattr(writer, "write_file", fails)
  assert call(monkeypatch, theirs[0], tmp_path / "x", "--to=timm") == 2
  assert "No space left on device" in capsys.readouterr().err
  assert not (tmp_path / "x").exists()


def test_force_replaces_what_is_there(tmp_path, monkeypatch, theirs):
  assert call(monkeypatch, theirs[0], tmp_path / "x") == 0
  assert call(monkeypatch, theirs[0], tmp_path / "x") == 2
  assert call(monkeypatch, theirs[0], tmp_path / "x", "--force") == 0
  assert read(tmp_path / "x" / "model.safetensors").num_classes == 10


def test_check_needs_timm(tmp_path, monkeypatch, capsys, theirs):
  monkeypatch.setitem(sys.modules, "timm", None)
  assert call(monkeypatch, theirs[0], tmp_path / "x", "--check") == 2
  assert "timm is not installed" in capsys.readouterr().err


def test_what_a_check_against_the_release_needs_is_said(tmp_path, monkeypatch, capsys, theirs):
  """The release's own code is none of ours, so that it is given by its folder; here there is none."""
  source, arguments = tmp_path / "b0.safetensors", ["--check", f"--official={tmp_path}"]
  networks.write_weights(source, "nf_regnet")
  assert call(monkeypatch, source, tmp_path / "x", *arguments) == 2
  assert f"--official={tmp_path}: expected the folder that holds nfnets/nf_regnet.py" in capsys.readouterr().err
  (tmp_path / "nfnets").mkdir()
  (tmp_path / "nfnets" / "nf_regnet.py").write_text("raise ImportError('no haiku')")
  assert call(monkeypatch, source, tmp_path / "x", *arguments) == 2
  assert "could not be run (dm-haiku is needed)" in capsys.readouterr().err
  assert call(monkeypatch, theirs[0], tmp_path / "x", *arguments) == 2
  assert "is test_nfnet, which the release has not" in capsys.readouterr().err
  assert call(monkeypatch, source, tmp_path / "x", f"--official={tmp_path}") == 2
  assert "--official is for --check, which is missing" in capsys.readouterr().err
  assert not (tmp_path / "x").exists()
