"""launch.features writes what the network computes, of data sets and photographs, and checks it on the digits."""

import importlib
import json
import sys

import numpy as np
import pytest
from flax import nnx

from launch import cli
from nfnets import models, predict
from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.data.sources.open import open_source
from nfnets.errors import UserError
from nfnets.evaluation import features
from nfnets.train import loop
from tests.evaluation.made import SQUASHED, write_pictures, write_weights

pytestmark = pytest.mark.usefixtures("two_devices")


def call(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
  module = importlib.import_module("launch.features")
  monkeypatch.setattr(sys, "argv", ["launch/features.py", *map(str, arguments)])
  with pytest.raises(SystemExit) as ended:
    cli.main(module.run, module.define, module.__doc__, arguments=True)
  return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
  "name, expected",
  [
    ("nfnet_f0", {2: "stem/conv2", 4: "blocks/0", 8: "blocks/2", 16: "blocks/8", 32: "blocks/11"}),
    ("nf_resnet50", {2: "stem/conv", 4: "blocks/2", 8: "blocks/6", 16: "blocks/12", 32: "blocks/15"}),
    ("nf_regnet_b1", {2: "stem", 4: "blocks/1", 8: "blocks/5", 16: "blocks/12", 32: "blocks/19"}),
    ("resnet50", {2: "stem/conv", 4: "blocks/2", 8: "blocks/6", 16: "blocks/12", 32: "blocks/15"}),
  ],
)
def test_the_last_map_of_each_stride(name, expected):
  assert features.strides(nnx.eval_shape(lambda: models.create(name, 10))) == expected


def test_features_of_a_data_set_are_the_networks(tmp_path, monkeypatch, capsys):
  path, out = write_weights(tmp_path / "x.safetensors"), tmp_path / "f.npz"
  network = predict.load(path).network
  stride = max(features.strides(network))
  status, printed, said = call(monkeypatch, capsys, f"--weights={path}", f"--out={out}", f"--layers=pool,{stride}", "digits")
  assert status == 0 and "features of test: 360 of 360 images" in said and "pool [360, 16]" in printed
  data = open_source(DataConfig(name="digits"), "test")
  images = predict.load(path).prepare([data[i].image for i in range(360)])

  @nnx.jit
  def run(network, images):
    maps = {}
    outputs = network.outputs(images, tap=lambda name, x: maps.update({name: x}))
    return outputs["pool"], maps[features.strides(network)[stride]]

  pool, last = run(network, images)
  with np.load(out) as file:
    np.testing.assert_allclose(file["pool"], pool, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(file[f"stride_{stride}"], last, rtol=1e-4, atol=1e-5)
    assert file["label"].tolist() == [data[i].label for i in range(360)]
    assert file["image"][3] == "digits test (record 4 of 360)" and file["class"].tolist() == [*map(str, file["label"])]


def test_features_of_photographs_and_those_that_are_none(tmp_path, monkeypatch, capsys):
  path, out = write_weights(tmp_path / "x.safetensors", preprocessing=SQUASHED), tmp_path / "f.npz"
  write_pictures(tmp_path / "photos", {"a": 3, "b": 2})
  (tmp_path / "photos" / "a" / "1.png").write_bytes(b"no picture")
  status, _, said = call(monkeypatch, capsys, f"--weights={path}", f"--out={out}", "--resolution=24", tmp_path / "photos")
  assert status == 1 and "a/1.png is no image that can be read" in said
  with np.load(out) as file:
    names = file["image"].tolist()
    assert [name[-7:] for name in names] == ["a/0.png", "a/2.png", "b/0.png", "b/1.png"] and "label" not in file
    classifier = predict.load(path)
    classifier.preprocessing.test_image_size = 24
    pool = nnx.jit(lambda network, images: network.outputs(images)["pool"])(classifier.network, classifier.prepare(names))
    np.testing.assert_allclose(file["pool"], pool, rtol=1e-4, atol=1e-5)


def test_parquet_holds_the_same(tmp_path, monkeypatch, capsys):
  parquet = pytest.importorskip("pyarrow.parquet")
  path = write_weights(tmp_path / "x.safetensors")
  for out in ("f.npz", "f.parquet"):
    assert call(monkeypatch, capsys, f"--weights={path}", f"--out={tmp_path / out}", "--layers=pool,2", "digits")[0] == 0
  table = parquet.read_table(tmp_path / "f.parquet")
  with np.load(tmp_path / "f.npz") as file:
    shape = [int(side) for side in table.schema.metadata[b"shape of stride_2"].split(b",")]
    np.testing.assert_array_equal(np.asarray(table["stride_2"].to_pylist(), np.float32).reshape(-1, *shape), file["stride_2"])
    np.testing.assert_array_equal(np.asarray(table["pool"].to_pylist(), np.float32), file["pool"])
    assert table["label"].to_pylist() == file["label"].tolist() and table["image"].to_pylist() == file["image"].tolist()


def test_a_trained_network_passes_the_check_on_digits(tmp_path, monkeypatch, capsys):
  """k-NN and the linear probe read the digits off its features nearly as well as its own classifier does."""
  config = Config(
    model=ModelConfig(name="nf_resnet_tiny", overrides={"width": (32,), "depth": (1,), "stage_strides": (1,)}),
    data=DataConfig(name="digits", mean=(77.8,) * 3, std=(95.9,) * 3),
    optim=OptimConfig(base_lr=0.4, warmup_epochs=0.5),
    batch=128,
    epochs=8,
  )
  own = loop.train(config, str(tmp_path / "run")).results["params"]["top1"]
  capsys.readouterr()
  status, printed, _ = call(monkeypatch, capsys, f"--weights={tmp_path / 'run'}", "--check", "digits")
  result = json.loads(printed.splitlines()[-1])
  assert status == 0 and (result["train"], result["test"]) == (1437, 360)
  assert result["check"]["pool"]["linear"] > max(0.7, own - 0.05) and result["check"]["pool"]["knn"] > 0.6


def test_checks_of_features_that_separate_and_of_noise():
  rng = np.random.default_rng(0)
  labels = np.arange(400) % 4
  rows = rng.normal(size=(400, 16)).astype(np.float32)
  good = rows + 4 * np.eye(16, dtype=np.float32)[labels]
  maps = np.broadcast_to(good[:, None, None], (400, 2, 3, 16))
  for each in (good, maps):
    assert min(features.check(each[:200], labels[:200], each[200:], labels[200:]).values()) > 0.95
  assert max(features.check(rows[:200], labels[:200], rows[200:], labels[200:]).values()) < 0.4


def test_too_many_features_are_refused_before_anything_is_computed():
  network = nnx.eval_shape(lambda: models.create("nfnet_f0", 10))
  read = features.reader(network, ["4"])
  with pytest.raises(UserError, match="the features of 50,000 images take 210 GB, more than the 9 GB"):
    features.check_size(network, read, (256, 256, 3), 50_000)
  features.check_size(network, features.reader(network, ["pool"]), (256, 256, 3), 50_000)


def test_no_pyarrow_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(UserError, match="Parquet needs pyarrow"):
    features.write(tmp_path / "f.parquet", {"pool": np.zeros((1, 2), np.float32)}, {})
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "arguments, expected",
  [
    (["digits"], "--weights is missing"),
    (["--weights=W"], "no images; expected the name of a data set"),
    (["--weights=W", "digits"], "--out is missing"),
    (["--weights=W", "--out=nowhere/f.npz", "digits"], "--out=nowhere/f.npz: there is no directory nowhere"),
    (["--weights=W", "--check", "--layers=pool,3", "digits"], "expected pool, or strides that the network has maps of: 2"),
    (["--weights=W", "--check", "digitz"], "unknown dataset config.data.name='digitz'; near: digits"),
    (["--weights=W", "--check", "x.png"], "--check, --split and --data_dir are for a data set"),
    (["--weights=W", "--out=f.npz", "x.png"], "none of the 1 images can be read"),
  ],
)
def test_mistakes_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, expected):
  path = write_weights(tmp_path / "x.safetensors")
  monkeypatch.chdir(tmp_path)
  status, _, said = call(monkeypatch, capsys, *[argument.replace("--weights=W", f"--weights={path}") for argument in arguments])
  lines = [line for line in said.splitlines() if line.startswith("error: ")]
  assert status == 2 and len(lines) == 1 and expected in lines[0] and "Traceback" not in said
  assert [each.name for each in tmp_path.iterdir()] == ["x.safetensors"]
