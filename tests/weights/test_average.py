"""Averages of weights: equal to numpy's in float64; another network, other classes or values that are not finite are refused."""

import dataclasses
import importlib
import json
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors

from launch import cli
from nfnets import predict
from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.train import loop
from nfnets.train.initial import read_weights
from nfnets.weights.average import average
from nfnets.weights.errors import WeightsError
from nfnets.weights.stored import Stored
from tests.weights.test_stored import CONFIG, TINY

pytestmark = pytest.mark.usefixtures("two_devices")


def stored(seed: int, **changes) -> Stored:
  rng = np.random.default_rng(seed)
  arrays = {
    "blocks/0/kernel": rng.normal(size=(3, 4)).astype(np.float32),
    "norm/var": rng.random(4).astype(np.float32),  # a running statistic
    "fc/bias": rng.normal(size=4).astype(ml_dtypes.bfloat16),
    "blocks/0/skip_gain": np.asarray(rng.normal(), np.float32),
  }
  fields = {"source": f"part {seed}", "arrays": arrays, "config": CONFIG, "num_classes": 4, "class_names": tuple("abcd")}
  return Stored(**{**fields, **changes})


def test_equals_numpy_in_float64_whatever_the_order_of_the_arrays():
  parts = [stored(seed) for seed in range(3)]
  turned = dataclasses.replace(parts[1], arrays=dict(reversed(parts[1].arrays.items())))
  mean = average(iter([parts[0], turned, parts[2]]))
  for name, array in mean.arrays.items():
    want = np.mean([part.arrays[name].astype(np.float64) for part in parts], axis=0).astype(array.dtype)
    assert isinstance(array, np.ndarray) and array.dtype == parts[0].arrays[name].dtype
    np.testing.assert_array_equal(array, want)
  assert mean.source == "the average of part 0, part 1, part 2" and mean.class_names == tuple("abcd")


def test_small_numbers_are_not_lost_beside_large_ones():
  """Sums of float32 would: 2^24 + 1 = 2^24."""
  values = [2.0**24, 1.0, 1.0, 2.0]
  parts = [stored(0, arrays={"w": np.array([value], np.float32)}) for value in values]
  assert average(parts).arrays["w"] == (2**24 + 4) / 4


def test_the_average_of_equals_is_the_same_to_the_bit():
  part = stored(5)
  mean = average([part] * 3)
  for name, array in part.arrays.items():
    np.testing.assert_array_equal(mean.arrays[name], array)


def with_array(name, array):
  arrays = stored(1).arrays
  return stored(1, arrays={**arrays, name: array} if array is not None else {k: v for k, v in arrays.items() if k != name})


def with_config(**changes):
  return stored(1, config=dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize(
  "other, message",
  [
    (
      with_array("blocks/0/kernel", np.zeros((3, 5), np.float32)),
      r"part 1 does not fit part 0.*kernel is \(3, 5\), expected \(3, 4\)",
    ),
    (with_array("norm/var", None), r"norm/var is missing, expected \(4,\)"),
    (with_array("more", np.zeros(2, np.float32)), r"more is \(2,\), expected none"),
    (with_array("fc/bias", np.full(4, np.nan, np.float32)), "part 1: fc/bias has values that are not finite"),
    (stored(1, num_classes=5, class_names=()), "the number of classes is 5, expected 4"),
    (stored(1, class_names=tuple("abdc")), "class 2 is 'd', expected 'c'; class 3 is 'c', expected 'd'$"),
    (with_config(loss="sigmoid"), "config.loss is 'sigmoid', expected 'softmax'"),
    (with_config(data=DataConfig(mean=(1.0, 2.0, 3.0))), r"config.data.mean is \(1.0, 2.0, 3.0\)"),
    (
      with_config(model=dataclasses.replace(CONFIG.model, activation="silu")),
      "the network's activation is 'silu', expected 'relu'",
    ),
  ],
)
def test_what_does_not_fit_is_refused_by_name(other, message):
  with pytest.raises(WeightsError, match=message):
    average([stored(0), other])


def test_one_alone_is_refused_and_what_only_training_reads_may_differ():
  with pytest.raises(WeightsError, match="averaging part 0: expected the weights of two or more"):
    average([stored(0)])
  model = dataclasses.replace(CONFIG.model, drop_rate=0.3, stochastic_depth=0.1, remat=True, dtype="bfloat16")
  average([stored(0), with_config(model=model, optim=OptimConfig(base_lr=0.7), seed=9)])


def call(monkeypatch, capsys, *arguments):
  module = importlib.import_module("launch.checkpoint")
  monkeypatch.setattr(sys, "argv", ["launch/checkpoint.py", *map(str, arguments)])
  with pytest.raises(SystemExit) as exit_:
    cli.main(module.run, module.define, module.__doc__, arguments=True)
  return exit_.value.code, *capsys.readouterr()


def test_steps_of_a_run_and_a_file_are_averaged_and_predict(tmp_path, monkeypatch, capsys):
  data = DataConfig(name="digits", mean=(77.8,) * 3, std=(95.9,) * 3)
  optim = OptimConfig(base_lr=0.4, warmup_epochs=0.25, ema_decay=0.9)
  model = ModelConfig(name="nf_resnet_tiny", overrides=TINY)
  run = tmp_path / "run"
  loop.train(Config(model=model, data=data, optim=optim, batch=480, eval_batch=360, epochs=2), str(run))
  first, second = run / "checkpoints" / "3", run / "checkpoints" / "6"
  out, again = tmp_path / "mean.safetensors", tmp_path / "again.safetensors"
  for weights in ((), ("--weights=params",)):
    assert call(monkeypatch, capsys, "average", first, second, f"--out={out}", "--force", *weights)[0] == 0
    parts = [read_weights(step, weights="params" if weights else "ema").arrays for step in (first, second)]
    mean = read_weights(out)
    for name, array in mean.arrays.items():
      np.testing.assert_array_equal(array, ((parts[0][name].astype(np.float64) + parts[1][name]) / 2).astype(np.float32))
  with safetensors.safe_open(out, framework="np") as file:
    metadata = file.metadata()
  assert json.loads(metadata["averaged"]) == [str(first), str(second)] and metadata["weights"] == "average"
  classifier = predict.load(out)
  assert classifier.class_names == tuple("0123456789")
  assert classifier(np.zeros((2, 8, 8, 3), np.uint8)).shape == (2, 10)
  assert call(monkeypatch, capsys, "average", out, run, f"--out={again}")[0] == 0  # a file with a run
  assert read_weights(again).preprocessing == mean.preprocessing
  status, _, error = call(monkeypatch, capsys, "average", out, run, f"--out={tmp_path / 'x'}", "--weights=ema")
  assert status == 2 and "is one file of weights" in error and not (tmp_path / "x").exists()
