"""launch.evaluate --weights: tables, files and JSON, the same from one process and from two; mistakes are one line."""

import csv
import errno
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.made import SQUASHED, write_pictures, write_weights
from tests.launch.test_launch import call
from tests.xla import FAST

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def weights(tmp_path) -> list[str]:
  return [write_weights(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (0, 1)]


def rows_of(path: pathlib.Path) -> list[dict[str, str]]:
  return list(csv.DictReader(path.read_text().splitlines()))


def test_two_weights_are_compared_and_reported(weights, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("COLUMNS", "120")
  out = tmp_path / "report"
  status, printed, said = call(monkeypatch, capsys, "evaluate", f"--weights={','.join(weights)}", f"--out={out}", "--per_image")
  assert status == 0 and "360 of 360 images" in said
  assert "against 1: who alone is right (McNemar's test)" in printed and "as the weights say" in printed
  first, second = json.loads(printed.splitlines()[-1])["results"]
  assert first["compared_with_first"] is None and first["published"] is None and first["count"] == 360
  tables = [rows_of(out / name / "images.csv") for name in "12"]
  right = [np.asarray([row["label"] == row["predicted"] for row in table]) for table in tables]
  assert [each.mean() for each in right] == pytest.approx([first["top1"], second["top1"]])
  assert second["compared_with_first"]["difference"] == pytest.approx(second["top1"] - first["top1"])
  assert np.mean([float(row["loss"]) for row in tables[0]]) == pytest.approx(first["loss"], rel=1e-4)
  assert [int(row["index"]) for row in tables[0]] == list(range(360))
  assert tables[0][4]["image"] == "digits test (record 5 of 360)"
  report = json.loads((out / "1" / "report.json").read_text())
  assert {key: report[key] for key in first} == first
  assert sum(row["images"] for row in report["per_class"]) == 360 and sum(row["count"] for row in report["reliability"]) == 360
  assert sum(row["images"] * row["top1"] for row in report["per_class"]) == pytest.approx(360 * first["top1"])
  for name in ("reliability.png", "confused.png", "wrong.png"):
    with Image.open(out / "1" / name) as picture:
      assert picture.size[0] > 300


def test_a_sweep_over_resolutions_on_a_folder(tmp_path, monkeypatch, capsys):
  path = write_weights(tmp_path / "x.safetensors", preprocessing=SQUASHED)
  write_pictures(tmp_path / "data" / "val", {str(label): 3 for label in range(10)})
  arguments = [f"--weights={path}", f"--data={tmp_path / 'data'}", "--crop=crop", "--batch=16"]
  status, printed, _ = call(monkeypatch, capsys, "evaluate", *arguments, "--resolutions=16,24")
  results = json.loads(printed.splitlines()[-1])["results"]
  assert status == 0 and [fact["protocol"].split(",")[0] for fact in results] == ["16 pixels", "24 pixels"]
  assert all(fact["count"] == 30 and fact["data"]["name"] == "folder" for fact in results)
  alone = call(monkeypatch, capsys, "evaluate", *arguments, "--resolution=24")[1]
  assert json.loads(alone.splitlines()[-1])["results"][0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)


def test_a_recipe_says_which_images_but_not_how_they_are_shown(weights, monkeypatch, capsys):
  recipe = ["--config=configs/digits.py", f"--weights={weights[0]}"]
  status, printed, _ = call(monkeypatch, capsys, "evaluate", *recipe, "--split=train")
  assert status == 0 and json.loads(printed.splitlines()[-1])["results"][0]["count"] == 1437
  status, _, said = call(monkeypatch, capsys, "evaluate", *recipe, "--config.data.test_image_size=24")
  assert status == 2 and "--config.data.test_image_size: the weights say how images are shown; --resolution changes that" in said


@pytest.mark.parametrize(
  "arguments, expected",
  [
    (["--weights=nowhere"], "nowhere is not there; expected"),
    (["--weights=W", "--checkpoint=runs"], "--weights and --checkpoint: expected one of them"),
    (["--weights=W", "--resolution=24"], "takes images as they are stored"),
    (["--weights=W", "--resolution=24", "--resolutions=24"], "--resolution and --resolutions: expected one of them"),
    (["--weights=W", "--resolutions=24,big"], "--resolutions=24,big: expected sides in pixels"),
    (["--weights=W", "--mean=1,2,x"], "--mean=1,2,x: expected three numbers"),
    (["--weights=W", "--std=1,2,0"], "std"),
    (["--weights=W", "--per_image"], "--out is missing"),
    (["--weights=W", "--out=README.md"], "README.md is a file, expected a directory for the report"),
    (["--weights=W", "--data=synthetic"], "synthetic has 1,000 classes, the weights 10"),
    (["--weights=W", "--data=digitz"], "unknown dataset config.data.name='digitz'; near: digits"),
    (["--weights=W", "--split=train"], "--split belongs to --data, which is missing"),
    (["--weights=W", "--data=digits", "--config=configs/digits.py"], "--data and --config: expected one of them"),
    (["--weights=W", "--corruptions=nowhere"], "--corruptions=nowhere: expected a folder with CORRUPTION/1/CLASS"),
    (["--weights=W", "--corruptions=nowhere", "--data=digits"], "--data and --corruptions: expected one of them"),
    (["--weights=W", "--crop_pct=2"], "test_crop_pct"),
    (["--weights=W", "--classes_map=nowhere.json"], "--classes_map=nowhere.json cannot be read"),
  ],
)
def test_mistakes_are_one_line_and_status_2(weights, monkeypatch, capsys, arguments, expected):
  arguments = [argument.replace("--weights=W", f"--weights={weights[0]}") for argument in arguments]
  status, _, said = call(monkeypatch, capsys, "evaluate", *arguments)
  lines = [line for line in said.splitlines() if line.startswith("error: ")]
  assert status == 2 and len(lines) == 1 and expected in lines[0] and "Traceback" not in said


def test_corruptions_are_a_table_and_a_picture(weights, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("COLUMNS", "140")
  path = write_weights(tmp_path / "squashed.safetensors", preprocessing=SQUASHED)
  names = ["blur/defocus_blur/1", "blur/defocus_blur/5", "noise/shot_noise/3"]
  for name in names:
    write_pictures(tmp_path / "c" / name, {str(label): 2 for label in range(10)})
  arguments = [f"--weights={path}", f"--corruptions={tmp_path / 'c'}", f"--out={tmp_path / 'out'}"]
  status, printed, said = call(monkeypatch, capsys, "evaluate", *arguments)
  (result,) = json.loads(printed.splitlines()[-1])["results"]
  assert status == 0 and "shot_noise 3 (1 of 3)" in said and "not all of ImageNet-C's 15 are there" in printed
  assert [*result["corruptions"]] == ["shot_noise", "defocus_blur"] and result["mce"] is None
  assert result["corruptions"]["defocus_blur"]["images"] == {"1": 20, "5": 20}
  _, alone, _ = call(monkeypatch, capsys, "evaluate", f"--weights={path}", f"--data={tmp_path / 'c' / names[2]}", "--split=all")
  top1 = json.loads(alone.splitlines()[-1])["results"][0]["top1"]
  assert result["corruptions"]["shot_noise"]["error"]["3"] == pytest.approx(1 - top1)
  assert json.loads((tmp_path / "out" / "corruptions.json").read_text())["results"] == [result]
  with Image.open(tmp_path / "out" / "corruptions.png") as picture:
    assert picture.size[0] > 300


def test_two_processes_give_what_one_gives(weights, tmp_path, monkeypatch, capsys):
  """Each has half of the images; the process that writes has all."""
  arguments = [f"--weights={weights[0]}", "--batch=50", "--per_image"]
  assert call(monkeypatch, capsys, "evaluate", *arguments, f"--out={tmp_path / '1'}")[0] == 0
  pods = [sys.executable, "-m", "launch.pods.local", "--processes=2", "--", sys.executable, "-m", "launch.evaluate"]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST}
  command = [*pods, *arguments, f"--out={tmp_path / '2'}"]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  for one, two in zip(*(rows_of(tmp_path / name / "images.csv") for name in "12"), strict=True):
    assert all(one[key] == two[key] for key in ("index", "image", "label", "predicted"))
    assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-4, abs=1e-5)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(weights, tmp_path, monkeypatch, capsys):
  def full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, "fsync", full)
  out = tmp_path / "report"
  status, _, said = call(monkeypatch, capsys, "evaluate", f"--weights={weights[0]}", f"--out={out}")
  assert status == 2 and f"error: --out={out}: cannot be written: No space left on device\n" in said
  assert list(out.iterdir()) == []
