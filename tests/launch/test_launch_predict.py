"""launch.predict finds photographs, prints their classes, and goes on where one cannot be read."""

import csv
import importlib
import io
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from launch import cli
from nfnets import predict
from nfnets.errors import UserError
from nfnets.predict import stream
from nfnets.predict.files import find_photos
from tests.evaluation.made import SQUASHED, write_pictures, write_weights


@pytest.fixture
def photos(tmp_path):
  write_pictures(tmp_path / "photos", {"a": 5, "b": 4})
  return tmp_path / "photos"


@pytest.fixture
def weights(tmp_path) -> str:
  names = [f"class [b]{label}[/b]" for label in range(10)]  # which rich would take for its markup
  return write_weights(tmp_path / "x.safetensors", preprocessing=SQUASHED, class_names=names)


def call(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
  module = importlib.import_module("launch.predict")
  monkeypatch.setattr(sys, "argv", ["launch/predict.py", *map(str, arguments)])
  with pytest.raises(SystemExit) as ended:
    cli.main(module.run, module.define, module.__doc__, arguments=True)
  return ended.value.code, *capsys.readouterr()


def test_each_format_says_what_the_classifier_says(weights, photos, monkeypatch, capsys):
  monkeypatch.setenv("COLUMNS", "300")
  files = [str(path) for path in sorted(photos.glob("*/*.png"))]
  expected = predict.load(weights).top(files, k=3)
  arguments = f"--weights={weights}", "--k=3", "--batch=4"
  status, out, said = call(monkeypatch, capsys, *arguments, "--format=jsonl", photos)
  lines = [json.loads(line) for line in out.splitlines()]
  assert status == 0 and "9 of 9 images" in said and [line["image"] for line in lines] == files
  for line, top in zip(lines, expected, strict=True):
    assert [each["class"] for each in line["classes"]] == [name for name, _ in top]
    assert [each["probability"] for each in line["classes"]] == pytest.approx([share for _, share in top], rel=1e-4)
  _, out, _ = call(monkeypatch, capsys, *arguments, "--format=csv", photos)
  rows = list(csv.DictReader(out.splitlines()))
  assert [(row["image"], row["rank"], row["class"]) for row in rows] == [
    (file, str(rank), name) for file, top in zip(files, expected, strict=True) for rank, (name, _) in enumerate(top, start=1)
  ]
  _, out, _ = call(monkeypatch, capsys, *arguments, photos)
  for file, top in zip(files, expected, strict=True):
    (line,) = [line for line in out.splitlines() if file in line]
    assert f"{top[0][0]} {top[0][1]:.1%}, {top[1][0]}" in line


def test_pictures_that_are_none_are_one_line_each_and_the_others_go_on(weights, photos, tmp_path, monkeypatch, capsys):
  (photos / "a" / "1.png").write_bytes(b"no picture")
  os.mkfifo(photos / "pipe.png")
  sheet = tmp_path / "sheet.png"
  arguments = [f"--weights={weights}", "--format=jsonl", f"--sheet={sheet}", "--batch=2"]
  status, out, said = call(monkeypatch, capsys, *arguments, photos, tmp_path / "none.png", "line\nbreak.png")
  lines = [json.loads(line) for line in out.splitlines()]
  assert status == 1 and sum("classes" in line for line in lines) == 8
  errors = [line["error"] for line in lines if "error" in line]
  assert [error.split("/")[-1] for error in errors] == [
    "pipe.png cannot be read: it is no regular file",
    "1.png is no image that can be read: not an image",
    "none.png cannot be read: No such file or directory",
    "line\\nbreak.png cannot be read: No such file or directory",
  ]
  assert all(error in said.splitlines() for error in errors) and "4 of 12 images cannot be read" in said
  with Image.open(sheet) as picture:
    assert picture.size[0] > 500


def test_names_come_from_folders_patterns_and_the_standard_input(weights, photos, monkeypatch, capsys):
  (photos / "a" / ".hidden.png").write_bytes(b"")
  (photos / "a" / "text.txt").write_bytes(b"")
  (photos / "loop").symlink_to(photos)
  (photos / "odd[1].png").write_bytes((photos / "b" / "0.png").read_bytes())
  formats = predict.load(weights).preprocessing.formats
  relative = lambda *names: [
    os.path.relpath(path, photos) for path in find_photos([str(photos / name) for name in names], formats)
  ]
  assert relative(".") == ["odd[1].png", *(f"a/{i}.png" for i in range(5)), *(f"b/{i}.png" for i in range(4))]
  assert relative("b/[12].*", "odd[1].png", "x*") == ["b/1.png", "b/2.png", "odd[1].png", "x*"]
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{photos}/a/2.png\n\n{photos}/b/3.png\n".encode())))
  status, out, _ = call(monkeypatch, capsys, f"--weights={weights}", "--format=jsonl", photos / "a" / "4.png", "-")
  assert status == 0 and [json.loads(line)["image"][-7:] for line in out.splitlines()] == ["a/4.png", "a/2.png", "b/3.png"]


def test_results_come_in_order_whatever_the_batch(weights):
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(23)]
  classifier = predict.load(weights)
  expected = classifier(images)
  mixed = [each for image in images for each in (image, b"no picture")]
  for batch in (1, 8, 100):
    results = list(stream.run_photos(classifier, mixed, batch=batch, threads=3))
    assert [result.place for result in results] == list(range(46)) and all(result.error for result in results[1::2])
    np.testing.assert_allclose([result.values["probabilities"] for result in results[::2]], expected, rtol=1e-4, atol=1e-6)


def test_images_of_another_size_are_refused_where_none_is_resized(tmp_path):
  classifier = predict.load(write_weights(tmp_path / "y.safetensors"))
  images = [np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)]
  results = list(stream.run_photos(classifier, images))
  assert [bool(result.error) for result in results] == [False, True, False]
  assert results[1].error.startswith("photograph 2 is 9×8, the first 8×8; expected one size")


def test_weights_that_are_not_finite_are_said(tmp_path):
  path = write_weights(tmp_path / "y.safetensors", change=lambda name, array: array * np.nan)
  with pytest.raises(UserError, match="numbers of .* that are NaN or infinite"):
    list(stream.run_photos(predict.load(path), [np.zeros((8, 8, 3), np.uint8)]))


@pytest.mark.parametrize(
  "arguments, expected",
  [
    (["x.png"], "--weights is missing"),
    (["--weights=W"], "no images; expected files, folders"),
    (["--weights=nowhere", "x.png"], "nowhere is not there"),
    (["--weights=W", "--sheet=nowhere/x.png", "x.png"], "--sheet=nowhere/x.png: there is no directory nowhere"),
    (["--weights=W", "--k=0", "x.png"], "k"),
  ],
)
def test_mistakes_are_one_line_and_status_2(weights, monkeypatch, capsys, arguments, expected):
  arguments = [argument.replace("--weights=W", f"--weights={weights}") for argument in arguments]
  status, _, said = call(monkeypatch, capsys, *arguments)
  lines = [line for line in said.splitlines() if line.startswith("error: ")]
  assert status == 2 and len(lines) == 1 and expected in lines[0] and "Traceback" not in said
