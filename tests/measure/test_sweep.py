"""The sweep over batch sizes: its order, its time, what it keeps; comparisons are pretended, the check of the step is real."""

import contextlib
import dataclasses
import json
import pathlib
import types

import pytest

from launch import bench as launch_bench, cli
from nfnets.config import Config, DataConfig, ModelConfig
from nfnets.errors import UserError
from nfnets.measure import check, sweep
from nfnets.train.checkpoints.compatibility import to_json

CONFIG = Config(model=ModelConfig(name="test_nfnet", dtype="bfloat16"), data=DataConfig(num_classes=10, image_size=32), batch=4)


@pytest.fixture
def pretended(monkeypatch):
  """Ours makes 10 images/s an image of the batch, timm 8, and 12 where it is compiled; 8 images do not fit."""
  asked = []

  def compare(config, peer, *, rounds, steps, torch_compile, torch_contiguous, together, kept):
    assert together and pathlib.Path(kept).is_dir()
    asked.append((config.batch, torch_compile, torch_contiguous))
    if config.batch >= 8:
      raise UserError("timm: out of memory; lower --batch")
    side = lambda speed: types.SimpleNamespace(images_per_s=speed * config.batch)
    details = {"peer": peer, "ours": {"device": "a chip"}}
    return types.SimpleNamespace(ours=side(10.0), theirs=side(12.0 if torch_compile else 8.0), to_json=lambda: details)

  monkeypatch.setattr(sweep.peers, "compare", compare)
  monkeypatch.setattr(sweep.peers, "check_installed", lambda peer: None)
  facts = {"model": "x", "dtype": "bfloat16", "loss": 1.0, "loss_float32": 1.0, "cosine": 1.0}
  monkeypatch.setattr(
    sweep, "Side", lambda name, file, job, environment: contextlib.nullcontext(types.SimpleNamespace(facts=facts))
  )
  return asked


def run(tmp_path, **changes):
  said = []
  arguments = {
    "batches": (2, 4, 8, 16),
    "minutes": 10.0,
    "steps": 5,
    "rounds": 1,
    "file": tmp_path / "sweep.json",
    "say": said.append,
  }
  return sweep.sweep([CONFIG], **{**arguments, **changes}), said


def test_batches_rise_until_memory_ends_then_timm_runs_in_other_ways(pretended, tmp_path):
  report, said = run(tmp_path)
  assert pretended == [(2, False, False), (4, False, False), (8, False, False), (4, True, False), (4, False, True)]
  best = report["best"]["test_nfnet"]
  assert best["ours"] == {"batch": 4, "images_per_s": 40.0} and best["theirs"]["way"] == "compiled"
  assert best["ratio"] == pytest.approx(40 / 48) and any("out of memory" in line for line in said)
  assert json.loads((tmp_path / "sweep.json").read_text())["best"] == report["best"]
  assert report["trials"][2]["ours"] is None and "out of memory" in report["trials"][2]["words"]


def test_what_would_end_too_late_is_left_out(pretended, tmp_path):
  report, said = run(tmp_path, minutes=0.0)
  assert pretended == [] and report["best"] == {"test_nfnet": None} and "no time was left" in said[-1]


def test_a_step_in_bfloat16_is_checked_against_float32():
  small = {"width": (16, 32), "depth": (1, 1), "stage_strides": (1, 2)}
  model = ModelConfig(name="nf_resnet_tiny", dtype="bfloat16", overrides=small)
  config = dataclasses.replace(CONFIG, model=model)
  found = check.Check(**check.start({"config": to_json(config)}).facts)
  assert found.right and found.loss != found.loss_float32 and 0.9 < found.cosine < 1
  assert not dataclasses.replace(found, cosine=0.5).right
  assert not dataclasses.replace(found, loss=2 * found.loss).right
  assert not dataclasses.replace(found, loss=float("nan")).right


def test_batches_are_numbers(capsys):
  values = launch_bench.flags.FlagValues()
  launch_bench.define(values)
  values(["bench", "--batches=64,x"])
  with pytest.raises(cli.UsageError, match="--batches: expected positive whole numbers, got 'x'"):
    launch_bench.sweep(values)


def test_the_table(pretended, tmp_path, capsys):
  launch_bench.print_sweep(run(tmp_path)[0])
  assert "compiled" in capsys.readouterr().out
