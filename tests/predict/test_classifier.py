"""A classifier gives for photographs what the evaluation of the run that trained it gives for the same pixels."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from nfnets import models, predict
from nfnets.config import Config, DataConfig, InitConfig, ModelConfig, OptimConfig
from nfnets.data.images import decode
from nfnets.data.sources.open import open_source
from nfnets.errors import UserError
from nfnets.train import loop
from nfnets.weights.errors import WeightsError
from tests.launch.test_launch_checkpoint import call

pytestmark = pytest.mark.usefixtures("two_devices")
TINY = {"width": (16,), "depth": (1,), "stage_strides": (1,)}


def config(**changes) -> Config:
  fields = {
    "model": ModelConfig(name="nf_resnet_tiny", overrides=TINY),
    "data": DataConfig(name="digits"),
    "optim": OptimConfig(base_lr=0.4, warmup_epochs=0.5, ema_decay=0.9),
    "batch": 128,
    "epochs": 2,
  }
  return Config(**(fields | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("trained")
  return workdir, loop.train(config(), str(workdir)).results


def test_a_run_and_its_export_predict_what_the_evaluation_counted(trained, tmp_path, monkeypatch, capsys):
  workdir, results = trained
  out = tmp_path / "digits.safetensors"
  assert call(monkeypatch, capsys, "export", workdir, f"--out={out}")[0] == 0
  data = open_source(DataConfig(name="digits"), "test")
  images, labels = zip(*[(data[i].image, data[i].label) for i in range(len(data))], strict=True)
  for source, weights, name in ((workdir, "params", "params"), (workdir, None, "ema"), (out, None, "ema")):
    classifier = predict.load(source, weights=weights)
    probabilities = classifier(images)
    assert np.mean(probabilities.argmax(axis=1) == labels) == pytest.approx(results[name]["top1"], abs=1e-6)
    assert -np.log(probabilities[np.arange(len(labels)), labels]).mean() == pytest.approx(results[name]["loss"], rel=1e-5)
    assert classifier.class_names == tuple("0123456789")
  (first,) = classifier.top(images[:1], k=3)
  assert [name for name, _ in first] == [str(label) for label in np.argsort(-probabilities[0])[:3]]
  assert first[0][1] == pytest.approx(probabilities[0].max())


def test_create_takes_weights(trained, tmp_path):
  """The front door, as in the README; the network is the classifier's, and everything that does not fit is said."""
  workdir, name = trained[0], config().model.name
  expected = predict.load(workdir)
  network = models.create(name, weights=workdir)
  images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
  np.testing.assert_array_equal(network(images), expected.network(images))
  with pytest.warns(UserWarning, match="a new classifier of 3 classes instead of the 10"):
    smaller = models.create(name, 3, weights=workdir)
  assert smaller(images).shape == (2, 3)
  np.testing.assert_array_equal(smaller.outputs(images)["pool"], network.outputs(images)["pool"])
  with pytest.raises(UserError, match="holds the weights of .*, not of nfnet_f0"):
    models.create("NFNet-F0", weights=workdir)
  with pytest.raises(UserError, match="nowhere is not there"):
    models.create(name, weights="nowhere")
  with pytest.raises(models.UnknownModelError):
    models.create("nfnet_f9", weights=workdir)


def test_photographs_are_cropped_and_turned_as_in_an_evaluation(trained):
  import dataclasses

  classifier = predict.load(trained[0])
  data = dataclasses.replace(classifier.preprocessing, test_crop="squash", test_image_size=16)
  classifier = dataclasses.replace(classifier, preprocessing=data)
  pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  file, exif = io.BytesIO(), Image.Exif()
  exif[0x0112] = 6  # to be turned by a quarter
  Image.fromarray(pixels).save(file, "PNG", exif=exif)
  upright = np.rot90(pixels, -1)
  prepared = classifier.prepare([file.getvalue(), upright])
  np.testing.assert_array_equal(prepared[0], prepared[1])
  expected = (decode.test_image(upright, 16, crop="squash") - np.float32(data.mean)) / np.float32(data.std)
  np.testing.assert_allclose(prepared[1], expected, rtol=1e-6, atol=1e-6)


def test_bad_photographs_and_sources_are_one_line(trained, tmp_path):
  classifier = predict.load(trained[0])
  (tmp_path / "x.jpg").write_bytes(b"no image")
  for photos, message in (
    ([tmp_path / "x.jpg"], "x.jpg is no image that can be read"),
    ([tmp_path / "none.jpg"], "none.jpg cannot be read: No such file"),
    ([np.zeros((8, 8), np.uint8)], r"an array is uint8 \(8, 8\), expected uint8 \[height, width, 3\]"),
    ([np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)], "the images have several sizes"),
    ([], "no photographs"),
  ):
    with pytest.raises(UserError, match=message):
      classifier(photos)
  for source, message in ((tmp_path / "none", "is not there"), (tmp_path, "no checkpoint there")):
    with pytest.raises(WeightsError, match=message):
      predict.load(source)


def test_a_run_begins_with_the_weights_of_another(trained, tmp_path, capsys):
  workdir, results = trained
  start = config(
    init=InitConfig(weights=str(workdir)), epochs=0.1, optim=OptimConfig(base_lr=1e-9, warmup_epochs=0, ema_decay=None)
  )
  continued = loop.train(start, str(tmp_path / "a"))
  assert f"begins with the weights ema of {workdir}" in capsys.readouterr().out
  assert continued.results["params"]["loss"] == pytest.approx(results["ema"]["loss"], rel=1e-4)
  start.init.new_head = True
  fresh = loop.train(start, str(tmp_path / "b"))
  assert fresh.results["params"]["loss"] > results["ema"]["loss"] + 0.1
  start.init = InitConfig(weights=str(tmp_path / "nowhere"))
  with pytest.raises(WeightsError, match="nowhere is not there"):
    loop.train(start, str(tmp_path / "c"))
  assert json.loads((tmp_path / "a" / "config.json").read_text())["init"] == {"weights": str(workdir), "new_head": False}


def test_weights_of_other_classes_need_a_new_head(trained, tmp_path):
  data = DataConfig(name="synthetic", num_classes=3, image_size=8)
  other = config(data=data, init=InitConfig(weights=str(trained[0])), batch=64, epochs=0.5)
  other.optim.warmup_epochs = 0.1
  with pytest.raises(WeightsError, match="has 10 classes, the dataset 3; expected as many, or config.init.new_head=True"):
    loop.train(other, str(tmp_path / "a"))
  other.init.new_head = True
  assert loop.train(other, str(tmp_path / "b")).finished
