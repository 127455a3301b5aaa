"""An evaluation shows the images as the weights say, counts each once on any devices, and knows which classes are which."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
import rich.console

from nfnets import predict
from nfnets.config import DataConfig
from nfnets.data.sources.base import ArraySource
from nfnets.data.sources.open import open_source
from nfnets.errors import UserError
from nfnets.evaluation import classes, evaluate, protocol, report
from nfnets.evaluation.published import published
from nfnets.train.step import sharding
from nfnets.weights.errors import WeightsError
from nfnets.weights.reader import read
from tests.evaluation.made import SQUASHED, write_pictures, write_weights

AS_THE_WEIGHTS = protocol.Overrides()


def evaluated(path, images=None, overrides=AS_THE_WEIGHTS, **more):
  return evaluate.evaluate_weights(read(path), images, overrides, say=lambda line: None, **more)


@pytest.mark.parametrize("devices, batch", [(8, 64), (3, 77), (1, 1000)])
def test_every_image_once_and_in_order(tmp_path, monkeypatch, devices, batch):
  """Against the classifier, which takes all images at once; batches and devices do not divide their number."""
  path = write_weights(tmp_path / "x.safetensors")
  make_mesh = sharding.make_mesh
  monkeypatch.setattr(sharding, "make_mesh", lambda: make_mesh(jax.devices()[:devices]))
  done = []
  result = evaluated(path, batch=batch, progress=lambda *counts: done.append(counts))
  data = open_source(DataConfig(name="digits"), "test")
  images, labels = zip(*[(data[i].image, data[i].label) for i in range(len(data))], strict=True)
  expected = predict.load(path)(images)
  assert result.index.tolist() == list(range(360)) and result.images.label.tolist() == list(labels)
  assert result.images.predicted.tolist() == expected.argmax(axis=1).tolist()
  np.testing.assert_allclose(result.images.confidence, expected.max(axis=1), rtol=1e-4)
  np.testing.assert_allclose(result.images.loss, -np.log(expected[np.arange(360), labels]), rtol=1e-3, atol=1e-5)
  assert done[-1] == (360, 360) and (result.images_per_s is None) == (batch == 1000)


def test_flips_average_the_logits_of_both(tmp_path):
  path = write_weights(tmp_path / "x.safetensors")
  classifier = predict.load(path)
  data = open_source(DataConfig(name="digits"), "test")
  rows = classifier.prepare([data[i].image for i in range(len(data))])
  logits = (classifier.network(rows) + classifier.network(rows[:, :, ::-1])) / 2
  result = evaluated(path, overrides=protocol.Overrides(flip=True))
  np.testing.assert_allclose(result.images.confidence, np.asarray(jax.nn.softmax(logits)).max(axis=1), rtol=1e-4)
  assert "averaged with the mirror image; overridden: flip" in result.protocol


def test_the_protocol_is_the_weights_unless_overridden(tmp_path):
  stored = read(write_weights(tmp_path / "x.safetensors", preprocessing=SQUASHED))
  folder = DataConfig(name="folder", dir="somewhere", test_split="val", test_crop="crop", test_image_size=99, max_corrupt=0.5)
  data = protocol.data_config(stored, folder, AS_THE_WEIGHTS)
  assert (data.dir, data.test_split, data.max_corrupt) == ("somewhere", "val", 0.5)
  assert (data.test_crop, data.test_image_size, data.mean) == ("squash", 16, (77.8,) * 3)
  overrides = protocol.Overrides(resolution=24, crop="short_side", mean=(0, 0, 0), std=(1, 1, 1))
  data = protocol.data_config(stored, folder, overrides)
  assert (data.test_crop, data.test_image_size, data.mean, data.std) == ("short_side", 24, (0, 0, 0), (1, 1, 1))
  assert protocol.describe(data, overrides).endswith("overridden: resolution, crop, mean, std")


def test_a_protocol_that_cannot_be_is_one_line(tmp_path):
  stored = read(write_weights(tmp_path / "x.safetensors"))
  for overrides, message in (
    (protocol.Overrides(resolution=24), "takes images as they are stored"),
    (protocol.Overrides(crop="squash"), "says no size; expected --resolution=N"),
    (protocol.Overrides(mean=(1.0, 2.0)), "mean"),
  ):
    with pytest.raises(UserError, match=message):
      protocol.data_config(stored, None, overrides)
  huge = read(write_weights(tmp_path / "y.safetensors", preprocessing={**SQUASHED, "size": 10**6}))
  with pytest.raises(WeightsError, match="1,000,000 pixels a side; expected 4,096 at most"):
    protocol.data_config(huge, None, AS_THE_WEIGHTS)
  with pytest.raises(UserError, match="no such directory"):
    protocol.images_of(str(tmp_path / "nowhere"))


def test_classes_are_found_by_name_by_number_and_by_what_is_there(tmp_path):
  path = write_weights(tmp_path / "x.safetensors", preprocessing=SQUASHED)
  write_pictures(tmp_path / "data" / "val", {"3": 4, "7": 5, "8": 3})
  folder = protocol.images_of(str(tmp_path / "data"))
  with pytest.raises(UserError, match="folder has 3 classes, the weights 10; expected as many .* or a --classes_map"):
    evaluated(path, folder)
  (tmp_path / "map.json").write_text(json.dumps({"source": "a test", "classes": [3, "7", 8]}))
  by_name = evaluated(path, folder, classes_map="names")
  by_number = evaluated(path, folder, classes_map=str(tmp_path / "map.json"))
  classifier = predict.load(path)
  files = sorted((tmp_path / "data" / "val").glob("*/*.png"))
  probabilities = classifier(files)[:, [3, 7, 8]]
  for result in (by_name, by_number):
    assert result.class_names == ("3", "7", "8") and result.images.label.tolist() == [0] * 4 + [1] * 5 + [2] * 3
    assert result.images.predicted.tolist() == probabilities.argmax(axis=1).tolist()
    expected = probabilities.max(axis=1) / probabilities.sum(axis=1)  # the other classes are left out
    np.testing.assert_allclose(result.images.confidence, expected, rtol=1e-4)
  write_pictures(tmp_path / "all" / "train", {str(label): 1 for label in range(10)})
  write_pictures(tmp_path / "all" / "val", {"3": 4, "7": 5, "8": 3})
  present = evaluated(path, protocol.images_of(str(tmp_path / "all")), classes_map="present")
  assert present.class_names == by_name.class_names
  np.testing.assert_allclose(present.images.loss, by_name.images.loss, rtol=1e-6)


@pytest.mark.parametrize(
  "content, message",
  [
    ("[1, 2", "is no JSON"),
    ("[" * 100_000, "is no JSON"),
    ('{"classes": {"a": 1}}', "expected {"),
    ('{"classes": [1, true]}', "expected {"),
    ('{"classes": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}', "has 11 classes, digits 10"),
    ('{"classes": [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]}', "class 9 of digits is 10, which is no class of the weights"),
    ('{"classes": [0, 1, 2, 3, 4, 5, 6, 7, 8, "nine"]}', "class 9 of digits is 'nine'"),
    ('{"classes": [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]}', "the same class of the network"),
    ('{"classes": [0, 1, 2, 3, 4, 5, 6, 7, 8, "9"]}', "class 9 of digits is '9', which is the name of several classes"),
    (None, "cannot be read: No such file"),
  ],
)
def test_class_maps_that_do_not_fit_are_one_line(tmp_path, content, message):
  twice = {"class_names": [*"012345699"] + ["9"]} if "several" in message else {}
  path = write_weights(tmp_path / "x.safetensors", **twice)
  if content is not None:
    (tmp_path / "map.json").write_text(content)
  with pytest.raises(UserError, match=message) as raised:
    evaluated(path, classes_map=str(tmp_path / "map.json"))
  assert "\n" not in str(raised.value)


def test_other_names_are_refused_unless_said_otherwise(tmp_path):
  path = write_weights(tmp_path / "x.safetensors", class_names=[*"abcdefghij"])
  with pytest.raises(UserError, match="class 0 was 'a', is '0'"):
    evaluated(path)
  assert evaluated(path, other_class_names=True).summary["count"] == 360


def test_weights_that_are_not_finite_are_one_line(tmp_path):
  path = write_weights(tmp_path / "x.safetensors", change=lambda name, array: array * np.nan if name == "fc/bias" else array)
  with pytest.raises(UserError, match="fc/bias holds 10 numbers of 10 that are NaN or infinite"):
    evaluated(path)


def test_images_that_are_none_are_left_out(tmp_path):
  path = write_weights(tmp_path / "x.safetensors", preprocessing=SQUASHED)
  write_pictures(tmp_path / "val", {str(label): 2 for label in range(10)})
  (tmp_path / "val" / "1" / "0.png").write_bytes(b"no picture")
  images = dataclasses.replace(protocol.images_of(str(tmp_path)), max_corrupt=0.1)
  result = evaluated(path, images)
  assert result.index.tolist() == [0, 1, *range(3, 20)] and [*result.corrupt] == [2] and result.summary["left_out"] == 1
  whole = evaluated(write_weights(tmp_path / "y.safetensors", preprocessing=SQUASHED, seed=1), images)
  first, second = evaluate.compare_all([result, whole])
  assert first is None and second["only_first"] == (result.images.correct & ~whole.images.correct).sum()


def test_a_map_restricts_data_that_has_all_classes(tmp_path):
  """As ImageNet-A's does with ImageNet's validation images: images of other classes are left out, and so are their logits."""
  path = write_weights(tmp_path / "x.safetensors", preprocessing=SQUASHED)
  write_pictures(tmp_path / "data" / "val", {str(label): 2 for label in range(10)})
  write_pictures(tmp_path / "part" / "val", {"3": 2, "7": 2, "8": 2})
  (tmp_path / "map.json").write_text(json.dumps({"source": "a test", "classes": [8, 3, 7]}))
  part = evaluated(path, protocol.images_of(str(tmp_path / "data")), classes_map=str(tmp_path / "map.json"))
  assert part.class_names == ("3", "7", "8") and part.index.tolist() == [6, 7, 14, 15, 16, 17]
  logits = predict.load(path)([tmp_path / "data" / "val" / name / f"{n}.png" for name in "378" for n in range(2)])[:, [3, 7, 8]]
  assert part.images.predicted.tolist() == logits.argmax(axis=1).tolist()


def test_imagenets_subsets_are_known_by_name():
  """TFDS gives ImageNet-A and -R all 1,000 classes; as folders they have 200."""

  class Images(ArraySource):
    def __init__(self, name, classes):
      super().__init__(name, "test", [str(label) for label in range(classes)], np.zeros((1, 1, 1, 3), np.uint8), np.zeros(1))

  for name, some in (("imagenet_a", [6, 11, 988]), ("imagenet_r", [1, 2, 988])):
    whole, folder = classes.plan("", (), 1000, Images(name, 1000)), classes.plan(name, (), 1000, Images("folder", 200))
    assert len(whole.subset) == 200 and whole.columns is None and set(some) <= set(whole.subset.tolist())
    np.testing.assert_array_equal(folder.columns, whole.subset)
  assert classes.plan("", (), 1000, Images("imagenet_v2/matched-frequency", 1000)) == classes.Plan()


def test_labels_by_several_people(tmp_path):
  path = write_weights(tmp_path / "x.safetensors", preprocessing=SQUASHED)
  write_pictures(tmp_path / "pictures", {str(label): 2 for label in range(10)})
  files = sorted((tmp_path / "pictures").glob("*/*.png"))
  for number, file in enumerate(files):
    (tmp_path / "data" / "val" / file.parent.name).mkdir(parents=True, exist_ok=True)
    file.rename(tmp_path / "data" / "val" / file.parent.name / f"ILSVRC2012_val_{number + 1:08}.JPEG")
  images = protocol.images_of(str(tmp_path / "data"))
  predicted = evaluated(path, images).images.predicted.tolist()
  labels = [[], [predicted[1]], [predicted[2], 3], [(predicted[3] + 1) % 10], *[[label] for label in predicted[4:]]]
  (tmp_path / "real.json").write_text(json.dumps(labels))
  real = evaluated(path, images, real_labels=str(tmp_path / "real.json")).summary["real"]
  assert (real["top1"], real["count"]) == (pytest.approx(18 / 19), 19)  # one has no label, one is wrong
  by_name = {f"ILSVRC2012_val_{number + 1:08}.JPEG": entry for number, entry in enumerate(labels)}
  (tmp_path / "names.json").write_text(json.dumps(by_name))
  assert evaluated(path, images, real_labels=str(tmp_path / "names.json")).summary["real"] == real
  (tmp_path / "short.json").write_text(json.dumps(labels[:5]))
  with pytest.raises(UserError, match="val_00000006.JPEG, which is not among the 5 labelled images; expected ILSVRC2012_val"):
    evaluated(path, images, real_labels=str(tmp_path / "short.json"))
  for content, message in (
    ("{", "is no JSON"),
    ('{"a": 1}', "expected a list of lists"),
    ("[[true]]", "expected a list of lists"),
  ):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(UserError, match=message):
      evaluated(path, images, real_labels=str(tmp_path / "bad.json"))


def test_published_figures_are_shown_where_they_belong():
  row = published("nfnet_f0", "imagenet2012", classes=1000, split="validation")
  assert (row["top1"], row["top5"], row["resolution"]) == (pytest.approx(0.83468), pytest.approx(0.9657), 256)
  assert published("nfnet_f0", "imagenet2012_real", classes=1000)["top1"] == pytest.approx(0.88123)
  assert published("dm_nfnet_f0", "imagenet_a", classes=200)["top1"] == pytest.approx(0.26773)
  assert published("nfnet_f0", "imagenet_a", classes=1000) is None  # published for the 200 classes that it has
  assert published("nfnet_f0", "imagenet2012", classes=1000, split="validation[:50%]") is None
  assert published("nfnet_f0", "imagenet_v2/topimages", classes=1000) is None
  assert published("nf_resnet_tiny", "imagenet2012", classes=1000) is None


def test_the_published_figure_stands_beside_ours_with_the_difference(tmp_path):
  ours = evaluated(write_weights(tmp_path / "x.safetensors"))
  ours = dataclasses.replace(ours, model="nfnet_f0", class_names=tuple(map(str, range(1000))))
  fact = report.facts(ours, None, "imagenet2012")
  assert (
    fact["published"]["difference"] == pytest.approx(ours.summary["top1"] - 0.83468) and "timm" in fact["published"]["source"]
  )
  console = rich.console.Console(width=150, file=io.StringIO())
  for table in report.tables([(ours, fact)], "title"):
    console.print(table)
  (row,) = [line for line in console.file.getvalue().splitlines() if "83.47% at 256 px" in line]
  assert f" {ours.summary['top1'] - 0.83468:+.2%} " in row
