"""launch.checkpoint lists, verifies and exports what training left, and answers mistakes in one line."""

import importlib
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from launch import cli
from nfnets.train.checkpoints import compatibility
from nfnets.train.checkpoints.writer import CheckpointWriter
from tests.faults.checkpoint_faults import FACTS, small_state
from tests.train.checkpoints.test_hostile import OLD, forge_meta, put


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
  where = tmp_path_factory.mktemp("run")
  writer = CheckpointWriter(str(where), FACTS, keep=1, keep_every=4.0, keep_best="ema_top1")
  for step in (5, 16, 20):
    top1 = {"params": {"top1": 0.5, "count": 9.0}, "ema": {"top1": 1 - step / 100}}
    writer.save(small_state(step), results=top1)
  writer.close()
  return where


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
  module = importlib.import_module("launch.checkpoint")
  monkeypatch.setattr(sys, "argv", ["launch/checkpoint.py", *map(str, arguments)])
  with pytest.raises(SystemExit) as exit_:
    cli.main(module.run, module.define, module.__doc__, arguments=True)
  return exit_.value.code, *capsys.readouterr()


def rows(out: str) -> list[list[str]]:
  return [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]


def test_list_shows_each_step_why_it_is_kept_and_what_counts_as_none(workdir, monkeypatch, capsys):
  monkeypatch.setenv("COLUMNS", "200")
  (workdir / "checkpoints" / "30.orbax-checkpoint-tmp").mkdir()
  (workdir / "checkpoints" / "25").mkdir()
  status, out, _ = call(monkeypatch, capsys, "list", workdir)
  (workdir / "checkpoints" / "30.orbax-checkpoint-tmp").rmdir()
  (workdir / "checkpoints" / "25").rmdir()
  listed = {row[0]: row for row in rows(out) if row[0]}
  assert status == 0 and list(listed) == ["5", "16", "20", "25"]
  assert [row[-2:] for row in listed.values()] == [["best", "good"], ["every", "good"], ["newest", "good"], ["", "no manifest"]]
  assert "│ ema_top1 0.9500 │" in out
  assert "\n25: has no manifest.json: unfinished, or the file is lost\n" in out
  assert listed["5"][1] == "1.28" and listed["5"][3].endswith(" MB") and listed["5"][4] == "top1 0.5000"
  assert "30.orbax-checkpoint-tmp: no checkpoint (unfinished" in out


def test_verify_names_each_damaged_file_and_exits_with_1(workdir, monkeypatch, capsys):
  status, out, _ = call(monkeypatch, capsys, "verify", workdir)
  assert status == 0 and out.count(": good\n") == 3 and "3 checkpoints, 0 bad; " in out and "MB/s" in out
  damaged = workdir / "checkpoints" / "16" / "ema" / "_METADATA"
  whole = damaged.read_bytes()
  damaged.write_bytes(b"?" + whole[1:])
  try:
    status, out, _ = call(monkeypatch, capsys, "verify", workdir)
    assert status == 1 and "3 checkpoints, 1 bad" in out
    assert "checkpoints/16: ema/_METADATA is damaged: its SHA-256 is another\n" in out
    assert call(monkeypatch, capsys, "verify", workdir / "checkpoints" / "20")[0] == 0
    assert call(monkeypatch, capsys, "verify", workdir / "checkpoints" / "16")[0] == 1
    damaged.unlink()
    status, out, _ = call(monkeypatch, capsys, "list", workdir)
    assert status == 0 and "\n16: ema/_METADATA is missing\n" in out and "│ damaged │" in out
  finally:
    damaged.write_bytes(whole)


def test_export_writes_the_average_under_our_names(workdir, tmp_path, monkeypatch, capsys):
  out = tmp_path / "network.safetensors"
  status, said, _ = call(monkeypatch, capsys, "export", workdir, f"--out={out}")
  assert status == 0 and "ema of " in said and "checkpoints/20" in said
  assert [path.name for path in tmp_path.iterdir()] == [out.name]
  with safetensors.safe_open(out, framework="np") as file:
    metadata, names = file.metadata(), set(file.keys())
    kernel = file.get_tensor("blocks/0/kernel")
  assert names == {"blocks/0/kernel", "fc/bias"}
  np.testing.assert_array_equal(kernel, small_state(20).ema[0]["blocks"]["0"]["kernel"])
  assert (
    json.loads(metadata["config"]) == compatibility.to_json(FACTS.config)
    and metadata["step"] == "20"
    and metadata["weights"] == "ema"
  )
  assert "jax" in json.loads(metadata["versions"])
  assert json.loads(metadata["class_names"]) == list("0123456789")
  assert json.loads(metadata["preprocessing"]) == {
    "crop": "none",
    "crop_pct": None,
    "resize": "tensorflow",
    "size": None,
    "interpolation": "bicubic",
    "mean": [123.675, 116.28, 103.53],
    "std": [58.395, 57.12, 57.375],
  }
  before = out.read_bytes()
  status, _, error = call(monkeypatch, capsys, "export", workdir, f"--out={out}")
  assert status == 2 and "is already there; --force replaces it" in error and out.read_bytes() == before
  step = workdir / "checkpoints" / "5"
  assert call(monkeypatch, capsys, "export", step, f"--out={out}", "--weights=params", "--force")[0] == 0
  with safetensors.safe_open(out, framework="np") as file:
    np.testing.assert_array_equal(file.get_tensor("blocks/0/kernel"), small_state(5).params["blocks"]["0"]["kernel"])


def test_the_best_step_is_exported_when_asked_for(workdir, tmp_path, monkeypatch, capsys):
  out = tmp_path / "network.safetensors"
  assert call(monkeypatch, capsys, "export", workdir, f"--out={out}", "--best")[0] == 0
  with safetensors.safe_open(out, framework="np") as file:
    assert file.metadata()["step"] == "5"
  status, _, error = call(monkeypatch, capsys, "export", workdir / "checkpoints" / "16", f"--out={out}", "--best", "--force")
  assert status == 2 and "--best and step 16: expected a workdir with --best, or a step without it" in error
  never = CheckpointWriter(str(tmp_path / "never evaluated"), FACTS, keep=1)
  never.save(small_state(3))
  never.close()
  status, _, error = call(monkeypatch, capsys, "export", tmp_path / "never evaluated", f"--out={out}", "--best", "--force")
  assert status == 2 and "no checkpoint in" in error and "has an evaluation with ema_top1 or top1" in error


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    ([], "subcommand: got nothing, expected list or verify or export or average"),
    (["lst", "x"], "got lst, expected list; e.g. python -m launch.checkpoint list runs/first"),
    (["list"], "list: expected one directory, got none"),
    (["list", "a", "b"], "expected one directory, got a b"),
    (["list", __file__], f"{__file__}: {__file__} is a file, expected a workdir, or WORKDIR/checkpoints/STEP"),
    (["verify", "/nowhere"], "/nowhere: no checkpoint there"),
    (["verify", "DIR/checkpoints/7"], "checkpoints/7: no checkpoint there"),
    (["verify", "DIR", "--force"], "--out, --weights, --best and --force are for export"),
    (["export", "DIR"], "--out is missing"),
    (["export", "DIR", "--out=/nowhere/x"], "there is no directory /nowhere"),
    (["export", "DIR", "--out=DIR"], "it is a directory"),
    (["export", "DIR", "--out=x", "--weights=best"], "params|ema"),
    (["average"], "average: expected two or more of: an export, a workdir, WORKDIR/checkpoints/STEP; got none"),
    (["average", "DIR", "--out=x"], "expected two or more"),
    (["average", "DIR", "DIR"], "--out is missing"),
    (["average", "DIR", "DIR", "--out=DIR"], "it is a directory"),
    (["average", "/nowhere", "DIR", "--out=x"], "/nowhere is not there"),
  ],
)
def test_mistakes_are_one_line_and_status_2(workdir, arguments, expected, monkeypatch, capsys):
  status, out, error = call(monkeypatch, capsys, *(argument.replace("DIR", str(workdir)) for argument in arguments))
  assert status == 2 and out == "" and error.count("\n") == 1 and error.startswith("error: ") and expected in error


@pytest.mark.parametrize("program", ["train", "evaluate", "checkpoint export"])
def test_a_made_up_checkpoint_ends_each_program_with_one_line(tmp_path, program, monkeypatch, capsys):
  shutil.copytree(OLD, tmp_path / "run")
  forge_meta(tmp_path / "run" / "checkpoints" / "7", put("config", "data", 5))
  where = str(tmp_path / "run")
  name, *rest = program.split()
  arguments = {
    "train": ["--config=configs/digits.py", f"--workdir={where}"],
    "evaluate": [f"--checkpoint={where}"],
    "checkpoint": [*rest, where, f"--out={tmp_path}/x.safetensors"],
  }
  module = importlib.import_module(f"launch.{name}")
  monkeypatch.setattr(sys, "argv", [f"launch/{name}.py", *arguments[name]])
  with pytest.raises(SystemExit) as exit_:
    cli.main(module.run, module.define, module.__doc__, arguments=name == "checkpoint")
  error = capsys.readouterr().err
  assert (
    exit_.value.code == 2 and error.count("\n") == 1 and "config.data: expected a mapping from names to values, got 5" in error
  )


def test_list_names_what_no_writer_has_named(workdir, monkeypatch, capsys):
  names = ["²", "007", "+5", "\x1b[31m"]
  for name in names:
    (workdir / "checkpoints" / name).mkdir()
  status, out, _ = call(monkeypatch, capsys, "list", workdir)
  for name in names:
    (workdir / "checkpoints" / name).rmdir()
  assert status == 0 and all(f"\n{name}: no checkpoint (" in out for name in names[:3]) and "\x1b" not in out
