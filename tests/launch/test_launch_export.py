"""launch.export writes files that run elsewhere, and answers mistakes in one line; README's code runs them."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from launch import cli, export
from nfnets import predict
from nfnets.weights.reader import read
from tests import golden
from tests.export import networks
from tests.test_readme import block


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
  networks.write_weights(path)
  return path


def call(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
  monkeypatch.setattr(sys, "argv", ["launch/export.py", *map(str, arguments)])
  with pytest.raises(SystemExit) as exit_:
    cli.main(export.run, export.define, str(export.__doc__))
  assert isinstance(exit_.value.code, int)
  return exit_.value.code, *capsys.readouterr()


def run_readme(beginning: str, where, package: str) -> str:
  """Runs a block of README in a process that cannot import nfnets; returns what it prints."""
  code = f"import sys; sys.modules['nfnets'] = None\n{block(beginning)}\nassert {package!r} in sys.modules"
  done = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def photo(weights, where) -> str:
  """Makes photo.png, and returns the class that the network gives it."""
  Image.fromarray(np.random.default_rng(2).integers(0, 256, (32, 32, 3), np.uint8)).save(where / "photo.png")
  ((name, _),) = predict.load(weights).top([where / "photo.png"], k=1)[0]
  return name


def test_onnx_runs_by_the_lines_in_readme(weights, tmp_path, monkeypatch, capsys):
  pytest.importorskip("onnx")
  pytest.importorskip("onnxruntime")
  arguments = (f"--weights={weights}", "--to=onnx", "--uint8", f"--out={tmp_path / 'digits.onnx'}", "--check")
  status, out, _ = call(monkeypatch, capsys, *arguments)
  assert status == 0 and "opset 17" in out and "check: largest difference" in out
  expected = photo(weights, tmp_path)
  assert run_readme("onnxruntime.InferenceSession", tmp_path, "onnxruntime") == expected


@pytest.mark.parametrize("options", [("--fold", "--check", "--bench"), ("--dtype=bfloat16", "--fold"), ()], ids=str)
def test_stablehlo_runs_by_the_lines_in_readme(weights, tmp_path, monkeypatch, capsys, options):
  pytest.importorskip("flatbuffers")
  file = tmp_path / "digits.zip"
  arguments = (f"--weights={weights}", "--to=stablehlo", "--uint8", f"--out={file}")
  status, out, _ = call(monkeypatch, capsys, *arguments, *options)
  assert status == 0 and ("after folding" in out) == ("--bench" in options)
  about = json.loads(zipfile.ZipFile(file).read("about.json"))
  assert about["class_names"][3] == "class 3" and about["preprocessing"]["size"] == 32
  expected = photo(weights, tmp_path)
  assert run_readme("jax.export.deserialize", tmp_path, "jax") == expected


def test_a_saved_model_gives_the_networks_logits(weights, tmp_path, monkeypatch, capsys):
  pytest.importorskip("tensorflow")
  out = tmp_path / "saved"
  status, said, _ = call(
    monkeypatch, capsys, f"--weights={weights}", "--to=saved", "--uint8", "--fold", f"--out={out}", "--check"
  )
  assert status == 0 and "check: largest difference" in said
  assert json.loads((out / "assets.extra" / "about.json").read_text())["class_names"][3] == "class 3"
  status, _, error = call(monkeypatch, capsys, f"--weights={weights}", "--to=saved", f"--out={out}")
  assert status == 2 and "--force replaces it" in error
  assert call(monkeypatch, capsys, f"--weights={weights}", "--to=saved", f"--out={out}", "--force")[0] == 0
  assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_timms_names_are_those_of_convert(tmp_path, monkeypatch, capsys):
  lines = str(golden.load("timm")["test_nfnet/names"]).split("\n")
  arrays = {line.split()[0]: np.ones([int(size) for size in line.split()[1:]], np.float32) for line in lines}
  source, out = tmp_path / "test_nfnet.safetensors", tmp_path / "folder"
  safetensors.numpy.save_file(arrays, source)
  assert call(monkeypatch, capsys, f"--weights={source}", "--to=timm", f"--out={out}")[0] == 0
  assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
  np.testing.assert_equal(safetensors.numpy.load_file(out / "model.safetensors"), arrays)


def test_safetensors_give_the_same_network(weights, tmp_path, monkeypatch, capsys):
  out = tmp_path / "again.safetensors"
  assert call(monkeypatch, capsys, f"--weights={weights}", "--to=safetensors", f"--out={out}")[0] == 0
  before, after = read(weights), read(out)
  assert after.config == before.config and after.class_names == before.class_names and after.preprocessing is not None
  assert after.preprocessing.test_image_size == 32
  np.testing.assert_equal(after.arrays, before.arrays)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--to=onx", "--out=x"), "--to=onx: expected onnx, stablehlo, saved, timm or safetensors"),
    (("--out=x",), "--to is missing"),
    (("--to=onnx",), "--out is missing"),
    (("--to=safetensors", "--out=nowhere/x"), "there is no directory nowhere"),
    (("--to=safetensors", "--out=there"), "--out=there is already there; --force replaces it"),
    (("--to=safetensors", "--out=."), "it is a directory"),
    (("--to=safetensors", "--out=x", "--fold"), "--fold --to=safetensors: weights alone are written"),
    (("--to=stablehlo", "--out=x", "--nchw"), "--nchw --to=stablehlo: expected --to=onnx"),
    (("--to=onnx", "--out=x", "--dtype=bfloat16"), "few runtimes convolve bfloat16"),
    (("--to=stablehlo", "--out=x", "--dtype=int8"), "--dtype=int8: expected float32 or bfloat16"),
    (("--to=safetensors", "--out=x", "--weights=none"), "none is not there"),
  ],
)
def test_mistakes_are_one_line_and_leave_no_file(weights, tmp_path, monkeypatch, capsys, arguments, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "there").write_text("old")
  status, _, error = call(monkeypatch, capsys, f"--weights={weights}", *arguments)
  assert status == 2 and message in error and error.count("\n") == 1
  assert [path.name for path in tmp_path.iterdir()] == ["there"] and (tmp_path / "there").read_text() == "old"


@pytest.mark.parametrize("to", ["onnx", "stablehlo", "saved"])
def test_a_missing_package_is_named(weights, tmp_path, monkeypatch, capsys, to):
  monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
  status, _, error = call(monkeypatch, capsys, f"--weights={weights}", f"--to={to}", f"--out={tmp_path / 'x'}")
  assert status == 2 and "is not installed: pip install" in error and error.count("\n") == 1


def test_a_full_disk_is_one_line(weights, tmp_path, monkeypatch, capsys):
  def full(path, content):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(export, "write_file", full)
  status, _, error = call(monkeypatch, capsys, f"--weights={weights}", "--to=safetensors", f"--out={tmp_path / 'x'}")
  assert status == 2 and error == f"error: --out={tmp_path / 'x'}: No space left on device\n"
