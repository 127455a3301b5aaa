"""Runs the programs as a person does: mistakes are one line and status 2, and the main job does what it promises."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from configs import digits
from launch import cli
from nfnets import models
from nfnets.config import Config
from nfnets.data.sources import builtin
from nfnets.train.checkpoints.errors import CheckpointError
from nfnets.train.evaluate import evaluate_checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]
DIGITS = "--config=configs/digits.py"


def call(monkeypatch, capsys, program: str, *arguments: str) -> tuple[int, str, str]:
  """Runs `python -m launch.PROGRAM ARGUMENTS` in this process; returns (status, stdout, stderr)."""
  module = importlib.import_module(f"launch.{program}")
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(sys, "argv", [f"launch/{program}.py", *arguments])
  with pytest.raises(SystemExit) as exit_:
    cli.main(module.run, module.define, module.__doc__, **({"arguments": True} if program in ("bench", "describe") else {}))
  out, err = capsys.readouterr()
  return exit_.value.code, out, err


@pytest.mark.parametrize(
  "arguments, expected",
  [
    (["--workdir=W"], "--config is missing"),
    ([DIGITS], "--workdir is missing"),
    (["--config=configs/digit.py", "--workdir=W"], "no file configs/digit.py; near: configs/digits.py"),
    (["--config=configs/digits.py:x", "--workdir=W"], "takes no argument, got 'x'"),
    (["--config=configs/cifar10.py:norm=batc", "--workdir=W"], "norm=none or norm=batch, got 'norm=batc'"),
    ([DIGITS, "--wrokdir=W"], "Did you mean: workdir"),
    ([DIGITS, "--workdir=W", "stray"], "unexpected argument 'stray'"),
    ([DIGITS, "--workdir=W", "--config.optim.base_lrr=1"], "OptimConfig has no field 'base_lrr'; near: base_lr"),
    ([DIGITS, "--workdir=W", "--config.bacth=1"], "Config has no field 'bacth'; near: batch"),
    ([DIGITS, "--workdir=gs://b/f0"], "gs://b/f0: expected a directory; mount the bucket"),
    ([DIGITS, "--workdir=W", "--config.batch=many"], "--config.batch=many"),
    ([DIGITS, "--workdir=W", "--config.batch=0"], "Config.batch = 0: expected"),
    ([DIGITS, "--workdir=W", "--config.batch=100"], "batch=100 is not divisible by the 8 devices; use 96 or 104"),
    ([DIGITS, "--workdir=W", "--config.epochs=-1.0"], "Config.epochs = -1.0"),
    ([DIGITS, "--workdir=W", "--config.optim.name=sdg"], "Did you mean 'sgd'?"),
    ([DIGITS, "--workdir=W", "--config.optim.clipping=0"], "OptimConfig.clipping = 0"),
    ([DIGITS, "--workdir=W", "--config.optim.warmup_epochs=99"], "warm-up of 99 epochs"),
    ([DIGITS, "--workdir=W", "--config.model.name=nfnet_f9"], "unknown model 'nfnet_f9'; near: nfnet_f"),
    ([DIGITS, "--workdir=W", "--config.model.activation=swosh"], "activation='swosh', expected one of"),
    ([DIGITS, "--workdir=W", "--config.model.dtype=float16"], "ModelConfig.dtype = 'float16'"),
    ([DIGITS, "--workdir=W", "--config.data.name=digit"], "unknown dataset config.data.name='digit'; near: digits"),
    ([DIGITS, "--workdir=W", "--config.data.name=cifar10", "--config.data.dir=/nowhere"], "dir='/nowhere' is not a directory"),
    ([DIGITS, "--workdir=W", "--config.data.num_classes=7"], "num_classes=7, but digits has 10 classes"),
    ([DIGITS, "--workdir=W", "--config.data.image_size=16"], "image_size=16, but the images of digits are 8×8"),
    ([DIGITS, "--workdir=W", "--config.data.image_size=0"], "DataConfig.image_size = 0: expected"),
    ([DIGITS, "--workdir=W", "--config.data.num_classes=0"], "DataConfig.num_classes = 0: expected"),
    ([DIGITS, "--workdir=/proc/x"], "--workdir=/proc/x"),
    ([DIGITS, "--workdir=README.md"], "--workdir=README.md: README.md is a file, expected a directory for this run"),
    ([DIGITS, "--workdir=README.md/run"], "--workdir=README.md/run: README.md is a file, expected a directory for this run"),
    ([DIGITS, "--workdir=W", "--config.data.train_crop=inception"], "train_crop='inception' with test_crop='none': images that"),
    (["--config", "configs/digits.py"], "--workdir is missing"),
  ],
)
def test_mistakes_in_training_are_one_line_and_status_2(monkeypatch, capsys, tmp_path, arguments, expected):
  arguments = [argument.replace("--workdir=W", f"--workdir={tmp_path / 'run'}") for argument in arguments]
  status, _, err = call(monkeypatch, capsys, "train", *arguments)
  lines = [line for line in err.splitlines() if line.startswith("error: ")]
  assert status == 2 and len(lines) == 1 and expected in lines[0]
  assert "Traceback" not in err
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
  "arguments, expected",
  [
    ([DIGITS], "--checkpoint is missing"),
    ([DIGITS, "--checkpoint=/nowhere"], "--checkpoint=/nowhere: no checkpoint there"),
    (["--checkpoint=/nowhere"], "--checkpoint=/nowhere: no checkpoint there"),
    (["--checkpoint=README.md"], "--checkpoint=README.md: README.md is a file, expected a workdir, or WORKDIR/checkpoints/STEP"),
    (["--checkpoint=/nowhere", "--config.eval_batch=9"], "but none is given: --config=FILE is missing"),
    ([DIGITS, "--checkpoint=runs/checkpoints/7"], "no checkpoint there"),
  ],
)
def test_mistakes_in_evaluation(monkeypatch, capsys, arguments, expected):
  status, _, err = call(monkeypatch, capsys, "evaluate", *arguments)
  assert status == 2 and expected in err
  assert not pathlib.Path("/nowhere").exists()


def test_describe_lists_and_describes(monkeypatch, capsys):
  assert call(monkeypatch, capsys, "describe")[1].split() == models.names()
  status, out, _ = call(monkeypatch, capsys, "describe", "nf_regnet_b0", "--num_classes=10")
  assert status == 0 and "nf_regnet_b0, 10 classes" in out and "stage 4" in out
  status, _, err = call(monkeypatch, capsys, "describe", "nfnet")
  assert status == 2 and "unknown model 'nfnet'" in err


RECIPES = sorted(set(ROOT.glob("configs/*.py")) - {ROOT / "configs" / "imagenet.py"})  # imagenet.py holds what recipes share


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_config_builds_its_network(path):
  """Its docstring also holds the command that runs it."""
  module = importlib.import_module(f"configs.{path.stem}")
  config = module.get_config(*(["nfnet_f0"] if path.stem == "finetune" else []))  # which has no network of its own
  assert isinstance(config, Config)
  assert models.variant(config.model.name, **config.model.all_overrides()).depth
  assert f"--config=configs/{path.name}" in module.__doc__


def data_of(name: str) -> Config:
  """Makes the recipe of the digits for other images, of the digits' size."""
  config = digits.get_config()
  config.data.name, config.data.image_size = name, 8
  return config


def test_the_main_job(tmp_path, monkeypatch, capsys):
  """Runs what `make digits` runs, a quarter as long: its checkpoint is right about at least 90 % of the test images."""
  environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}

  def run(program: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"launch.{program}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout

  trained = run("train", DIGITS, f"--workdir={tmp_path}", "--config.epochs=11")
  for words in ("  config.optim.base_lr = 0.4\n", "kernels, unclipped", "images/s", "  clip ", "123/123", "curves.png"):
    assert words in trained
  by_itself = json.loads(run("evaluate", f"--checkpoint={tmp_path}").splitlines()[-1])  # with the configuration in the checkpoint
  for weights in ("params", "ema"):
    assert by_itself[weights]["count"] == 360 and by_itself[weights]["top1"] >= 0.9
  status, printed, _ = call(
    monkeypatch, capsys, "evaluate", DIGITS, f"--checkpoint={tmp_path}/checkpoints/123", "--config.eval_batch=77"
  )
  evaluated = json.loads(printed.splitlines()[-1])
  assert status == 0 and evaluated["step"] == by_itself["step"] == 123
  for weights in ("params", "ema"):
    assert by_itself[weights] == pytest.approx(evaluated[weights], rel=1e-6)
  with pytest.raises(
    CheckpointError, match=r"name='synthetic' has 1,000 classes, the checkpoint .*/checkpoints/123 10; expected"
  ):
    evaluate_checkpoint(data_of("synthetic"), str(tmp_path))

  def open_renamed(config, split, **_):
    source = builtin.digits(split)
    source.class_names = tuple("1023456789")
    return source

  monkeypatch.setattr("nfnets.train.evaluate.open_source", open_renamed)
  message = r"name='digits' has other classes than .*: the same classes in another order: class 0 was '0', is '1' \(and 1 more\)"
  with pytest.raises(CheckpointError, match=message):
    evaluate_checkpoint(None, str(tmp_path))
  renamed = evaluate_checkpoint(None, str(tmp_path), other_class_names=True)
  assert renamed.results["params"]["top1"] == evaluated["params"]["top1"]
