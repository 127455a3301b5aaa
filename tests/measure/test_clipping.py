"""`launch.bench agc` times what it says, and its two kinds of clipping agree. No test checks a duration."""

import dataclasses
import json

import jax
import pytest

from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.errors import UserError
from nfnets.measure import clipping
from tests.launch.test_launch import call

ONE_BLOCK = {"depth": (1,), "width": (32,), "stage_strides": (1,)}
CONFIG = Config(
  model=ModelConfig(name="nfnet_tiny", overrides=ONE_BLOCK),
  data=DataConfig(num_classes=10, image_size=16),
  optim=OptimConfig(clipping=0.01),
)


@pytest.fixture(scope="module")
def report() -> clipping.ClippingReport:
  return clipping.compare_clipping(CONFIG, rounds=2, steps=2, warmup=1)


def test_both_clip_alike(report):
  assert 0 <= report.difference < 1e-6


def test_a_wrong_clipping_would_be_seen(monkeypatch):
  monkeypatch.setattr(clipping, "agc", lambda strength, eps, **kwargs: clipping.optax.adaptive_grad_clip(1.1 * strength, eps))
  assert clipping.compare_clipping(CONFIG, rounds=1, steps=1, warmup=1).difference > 0.05


def test_figures_follow_from_the_rounds(report):
  ours, theirs = report.alone[clipping.OURS], report.alone[clipping.OPTAX]
  assert len(ours.rounds_ms) == 2 and ours.ms == sum(ours.rounds_ms) / 2
  assert report.round_ratios == tuple(a / b for a, b in zip(ours.rounds_ms, theirs.rounds_ms, strict=True))
  assert list(report.with_sgd) == [clipping.NONE, *report.alone]
  assert report.clipping == 0.01 and report.device_kind == jax.devices()[0].device_kind
  read = json.loads(json.dumps(report.to_json(), allow_nan=False))
  assert read.pop("benchmark") == "agc" and read.pop("round_ratios") == list(report.round_ratios)
  assert set(read) == {field.name for field in dataclasses.fields(report)}


def test_no_clipping_to_measure_is_an_error():
  with pytest.raises(UserError, match="config.optim.clipping=None; set it"):
    clipping.compare_clipping(dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, clipping=None)))


def test_the_program_shows_a_table_and_hands_out_json(monkeypatch, capsys, tmp_path):
  file = tmp_path / "agc.json"
  overrides = [f"--config.model.overrides.{name}={value}" for name, value in ONE_BLOCK.items()]
  arguments = ["--config=configs/digits.py", *overrides, "--rounds=1", "--steps=1", "--warmup=1", f"--json={file}"]
  status, out, err = call(monkeypatch, capsys, "bench", "agc", *arguments)
  assert status == 0, err
  assert all(text in out for text in (clipping.OPTAX, clipping.OURS, clipping.TRACKED, "over no clipping", "ours / optax, alone"))
  assert json.loads(out.splitlines()[-1]) == json.loads(file.read_text())


@pytest.mark.parametrize("flag", ["--peer=timm", "--profile=traces", "--without-agc"])
def test_a_flag_of_another_subcommand_is_refused(flag, monkeypatch, capsys):
  status, _, err = call(monkeypatch, capsys, "bench", "agc", "--config=configs/digits.py", flag)
  assert status == 2 and "belongs to the subcommand step, not to agc" in err
