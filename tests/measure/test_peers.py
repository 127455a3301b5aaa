"""Our step beside a peer's: the turns, with sides that only pretend; what is refused; one step of ours and one of timm's."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys

import jax
import numpy as np
import pytest

from launch import bench as launch_bench, cli
from nfnets import models
from nfnets.agc import named_leaves
from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.errors import UserError
from nfnets.measure import peers, runs
from nfnets.measure.turns import MissingPackage, Side, SideError
from nfnets.train.step import sharding
from nfnets.weights import timm as timm_names
from nfnets.weights.network import fill
from tests import golden

ROOT = pathlib.Path(__file__).parents[2]
PRETENDER = """
print("this is no answer")

class UserError(ValueError):
  pass

class Pretended:
  def __init__(self, job):
    self.answers, self.asked = list(job["seconds"]), []
    self.facts = {"network": job["network"], "device": "cpu", "parameters": 7, "build_s": 1.0, "compile_s": 2.0, "versions": {}}

  def seconds(self, steps):
    self.asked.append(steps)
    return self.answers.pop(0)

  def loss(self):
    print(self.asked)
    return self.answers.pop(0)

def start(job):
  if "raise" in job:
    exec(job["raise"])
  return Pretended(job)
"""


def tiny(**changes) -> Config:
  config = Config(model=ModelConfig(name="test_nfnet"), data=DataConfig(num_classes=10, image_size=32), batch=4)
  return dataclasses.replace(config, **changes)


@pytest.fixture
def pretender(tmp_path) -> str:
  file = tmp_path / "pretender.py"
  file.write_text(PRETENDER)
  return str(file)


# ---- the protocol of turns


def test_sides_take_turns_and_the_ratio_is_of_each_rounds_medians(pretender, monkeypatch):
  """Ten steps a turn are five blocks of two, after a step that is not timed; five to warm up are five blocks of one."""
  ours = [*[9.0] * 5, 99.0, 1, 2, 3, 4, 50, 99.0, 2, 4, 6, 8, 10, 99.0, 3, 3, 3, 3, 3, 0.5]
  theirs = [*[9.0] * 5, 99.0, 6, 6, 6, 6, 6, 99.0, 4, 4, 4, 4, 4, 99.0, 1, 2, 4, 80, 90, 0.25]
  lines = []

  @contextlib.contextmanager
  def started(peer, their_job, our_job, say, **how):
    assert their_job["batch"] == 4 and our_job["size"] == 32
    with (
      Side(peer, pretender, {"network": "theirs", "seconds": theirs}) as their_side,
      Side("nfnets", pretender, {"network": "ours", "seconds": ours}) as our_side,
    ):
      yield our_side, their_side

  monkeypatch.setattr(peers, "started", started)
  monkeypatch.setattr(peers, "check_installed", lambda peer: None)
  report = peers.compare(tiny(), "timm", rounds=3, steps=10, warmup=5, say=lines.append)
  assert report.ours.round_ms == (3000, 6000, 3000) and report.theirs.round_ms == (6000, 4000, 4000)
  assert report.round_ratios == (0.5, 1.5, 0.75)
  assert (report.ratio.median, report.ratio.minimum, report.ratio.maximum) == (0.75, 0.5, 1.5)
  assert report.ours.step_ms.count == report.theirs.step_ms.count == 15
  assert report.ours.step_ms.median == 1e3 * statistics.median([1, 2, 3, 4, 50, 2, 4, 6, 8, 10, 3, 3, 3, 3, 3])
  assert report.ours.images_per_s == pytest.approx(4e3 / report.ours.step_ms.median)
  assert (report.ours.loss, report.theirs.loss) == (0.5, 0.25)
  order = [line.split()[2] for line in lines if line.startswith("round")]
  assert order == ["nfnets:", "timm:"] * 3
  assert "× 0.750 the peer's time a step (no clear difference); 0.500 to 1.500 over 3 rounds of 10 steps" in str(report)
  read = json.loads(json.dumps(report.to_json(), allow_nan=False))
  assert read["benchmark"] == "peers" and read["ratio"]["median"] == 0.75 and read["theirs"]["network"] == "theirs"


@pytest.mark.parametrize("steps, blocks", [(1, 1), (4, 4), (5, 5), (12, 6), (50, 5)])
def test_a_turn_is_about_five_blocks(pretender, steps, blocks):
  with Side("x", pretender, {"network": "", "seconds": [1.0] * 20}) as side:
    assert len(side.seconds(steps)) == blocks


@pytest.mark.parametrize(
  "code, error, message",
  [
    ("import no_such_package", MissingPackage, "no_such_package"),
    ("raise UserError('set it')", SideError, "x: set it"),
    ("raise MemoryError('CUDA out of memory. Tried')", SideError, "x: out of memory; lower --batch"),
    ("raise ValueError('a bug')", RuntimeError, "process of x ended with status 1(.|\n)*Traceback(.|\n)*a bug"),
    ("import os; os._exit(9)", RuntimeError, "process of x ended with status 9"),
  ],
)
def test_a_side_that_cannot_start_says_why(pretender, code, error, message):
  with pytest.raises(error, match=message):
    Side("x", pretender, {"network": "", "seconds": [], "raise": code})


def test_a_side_that_fails_in_its_turn_says_why(pretender):
  with Side("x", pretender, {"network": "", "seconds": [float("nan")]}) as side:
    with pytest.raises(SideError, match="x: its loss is nan"):
      side.loss()
  with Side("x", pretender, {"network": "", "seconds": []}) as side:
    with pytest.raises(RuntimeError, match="pop from empty list"):
      side.seconds(1)


def test_a_process_is_gone_after_its_side_is_closed(pretender):
  with Side("x", pretender, {"network": "", "seconds": []}) as side:
    assert side._process.poll() is None
  assert side._process.returncode == 0


# ---- what is compared


def test_networks_that_timm_has_are_found_in_its_dialect():
  f0 = peers.timm_network(tiny(model=ModelConfig(name="nfnet_f0", drop_rate=0.3)))
  assert f0.job == {"network": "dm_nfnet_f0", "overrides": {"drop_rate": 0.3, "drop_path_rate": 0.25}}
  assert f0.overrides == {"dialect": "timm_dm", "activation": "gelu_erf"} and "in timm's dialect" in f0.words
  timms = ModelConfig(name="nfnet_f0", overrides={"dialect": "timm"})
  assert peers.timm_network(tiny(model=timms)).job["network"] == "nfnet_f0"
  assert peers.timm_network(tiny(model=ModelConfig(name="nf_resnet50"))).job["network"] == "nf_resnet50"
  assert peers.timm_network(tiny()).words == "as the recipe says, which is timm's test_nfnet"
  small = peers.timm_network(tiny(model=ModelConfig(name="nf_resnet_tiny")))
  assert small.job["built"]["depths"] == (2, 2, 2) and small.words == "in timm's dialect, built of timm's blocks"


@pytest.mark.parametrize(
  "model, message",
  [
    ({"name": "nfnet_tiny"}, "timm has no equal of nfnet_tiny; it has nfnet_f0, .*nf_resnet50"),
    ({"name": "nf_resnet_tiny", "overrides": {"gate": "se"}}, "timm has no equal of nf_resnet_tiny"),
    ({"name": "nf_resnet_tiny", "overrides": {"stage_strides": (1, 1, 2)}}, "timm has no equal of nf_resnet_tiny"),
    ({"name": "nfnet_f0", "overrides": {"depth": (1, 1, 1, 1)}}, r"no equal of nfnet_f0 with depth=\(1, 1, 1, 1\)"),
    ({"name": "nf_resnet50", "activation": "silu"}, "no equal of nf_resnet50 with activation='silu'"),
  ],
)
def test_networks_that_timm_has_not(model, message):
  with pytest.raises(UserError, match=message):
    peers.timm_network(tiny(model=ModelConfig(**model)))


@pytest.mark.parametrize(
  "name, module, network, variant",
  [
    ("nfnet_f0", "nfnet", "NFNet", "F0"),
    ("nfnet_f1+", "nfnet", "NFNet", "F1+"),
    ("nf_resnet50", "nf_resnet", "NF_ResNet", "ResNet50"),
    ("nf_regnet_b0", "nf_regnet", "NF_RegNet", "B0"),
  ],
)
def test_networks_of_the_release_are_found(tmp_path, name, module, network, variant):
  (tmp_path / "nfnets").mkdir()
  (tmp_path / "nfnets" / "nfnet.py").touch()
  job = peers.haiku_network(tiny(model=ModelConfig(name=name)), str(tmp_path)).job
  assert (job["module"], job["class"], job["overrides"]["variant"], job["official"]) == (module, network, variant, str(tmp_path))
  with pytest.raises(UserError, match="the release has no equal of nfnet_tiny; it has nfnet_f0 to nfnet_f7"):
    peers.haiku_network(tiny(model=ModelConfig(name="nfnet_tiny")), str(tmp_path))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"optim": OptimConfig(name="adamw")}, "config.optim.name='adamw': .* config.optim.name='sgd' alone"),
    ({"optim": OptimConfig(sam_rho=0.05)}, "config.optim.sam_rho=0.05"),
    ({"optim": OptimConfig(momentum=0.0)}, "config.optim.momentum=0"),
    ({"loss": "sigmoid"}, "config.loss='sigmoid'"),
    ({"accumulate": 2}, "config.accumulate=2"),
    ({"model": ModelConfig(remat=True)}, "config.model.remat=True"),
  ],
)
def test_other_work_than_the_peers_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    peers.check_same_work(tiny(**changes))


@pytest.mark.parametrize(
  "theirs, message",
  [
    ({"parameters": 8, "device": "cpu"}, "--peer=timm has another network: 8 parameters, ours 7"),
    ({"parameters": 7, "device": "NVIDIA H100"}, "ours runs on cpu and --peer=timm on NVIDIA H100; install both"),
  ],
)
def test_sides_that_do_not_match_are_refused(theirs, message):
  with pytest.raises(UserError, match=message):
    peers.check_match({"parameters": 7, "device": "cpu"}, theirs, "timm")


@pytest.mark.parametrize("peer, package", [("timm", "torch"), ("timm", "timm"), ("haiku", "haiku"), ("haiku", "dill")])
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, peer, package):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else object())
  with pytest.raises(UserError, match=f"{package} is not installed, which --peer={peer} needs: pip install "):
    peers.check_installed(peer)


def test_a_package_that_is_found_missing_later_is_named_too(monkeypatch):
  def side(*arguments, **options):
    raise MissingPackage("timm", "torchvision")

  monkeypatch.setattr(peers, "Side", side)
  with pytest.raises(
    UserError, match="torchvision is not installed, which --peer=timm needs: pip install torch torchvision timm"
  ):
    with peers.started("timm", {}, {}, print):
      pass


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("step", "--peer=torch"), "--peer=torch"),
    (("step", "--peer=timm", "--without-agc"), "--without-agc and --peer=timm are two benchmarks"),
    (("step", "--peer=timm", "--official=x"), "--official is the directory of --peer=haiku's code"),
    (("step", "--official=x"), "--official is the directory of --peer=haiku's code"),
    (("step", "--peer_compile"), "give --peer=timm with it"),
    (("step", "--peer=haiku", "--peer_compile"), "give --peer=timm with it"),
    (("step", "--peer=haiku"), "--peer=haiku needs --official=DIR"),
    (("step", "--peer=haiku", "--official=no/such"), "--official=no/such: no nfnets/nfnet.py in it"),
    (("step", "--peer=timm", "--profile=x"), "--profile traces our step alone"),
    (("step", "--peer=timm", "--rounds=0"), "rounds"),
    (("step", "--peer=timm"), "timm has no equal of nfnet_digits"),
    (("step", "--peer=timm", "--config.model.name=nfnet_f0", "--config.optim.sam_rho=0.1"), "config.optim.sam_rho=0.1"),
    (("step", "--profile=README.md/x"), "README.md is a file, expected a directory for the trace"),
    (("data", "--peer=timm"), "--peer belongs to the subcommand step"),
    (("data", "--profile=x"), "--profile belongs to the subcommand step"),
  ],
)
def test_program_answers_a_mistake_in_one_line(arguments, message, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(sys, "argv", ["launch/bench.py", "--config=configs/digits.py", *arguments])
  monkeypatch.setattr(peers, "check_installed", lambda peer: None)
  with pytest.raises(SystemExit) as stopped:
    cli.main(launch_bench.run, launch_bench.define, "", arguments=True)
  printed = capsys.readouterr()
  assert stopped.value.code == 2
  assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1


# ---- the same work


def test_a_peer_is_told_the_learning_rate_and_its_warm_up():
  job = peers.work(tiny(batch=512, optim=OptimConfig(base_lr=0.1, warmup_epochs=5, clipping=math.inf)), size=32, classes=10)
  assert job["learning_rate"] == 0.2 and job["warmup_steps"] == 5 * 1_281_167 / 512
  assert job["clipping"] is None and job["nesterov"] is True and json.loads(json.dumps(job)) == job


def test_the_release_is_imported_in_place_of_this_package(tmp_path):
  """Both are called nfnets; the release's has no __init__.py, so that Python alone would prefer any other."""
  (tmp_path / "nfnets").mkdir()
  (tmp_path / "nfnets" / "base.py").write_text("whose = 'release'")
  program = (
    f"import runpy; runpy.run_path({str(ROOT / 'nfnets' / 'weights' / 'official.py')!r})['find_release']({str(tmp_path)!r})"
  )
  program += "; from nfnets import base; print(base.whose)"
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "release"


def filled_run(config: Config) -> tuple[runs.Run, dict[str, np.ndarray]]:
  """Our compiled step for one device, with weights at which mistakes show, and these weights by timm's names.

  Standardized kernels are small, so that AGC clips them; gains are not, because timm clips each of their numbers by itself.
  """
  ready = runs.prepare(config, sharding.make_mesh(jax.devices()[:1]), 32, 10)
  run = ready.run
  arrays = golden.fill_all({path: leaf.shape for path, leaf, _ in named_leaves(run.state.params)})
  small = lambda path: path.endswith("kernel") and "/se/" not in path and not path.startswith("fc/")
  arrays = {path: np.float32(0.05) * array if small(path) else array for path, array in arrays.items()}
  place = lambda like: jax.device_put(fill(like, arrays, "golden"), jax.devices()[0])
  average = (place(run.state.params), run.state.ema[1])
  put = lambda tree, like: jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), tree, like)
  run.state = dataclasses.replace(
    run.state, params=put(place(run.state.params), run.state.params), ema=put(average, run.state.ema)
  )
  return run, timms_names(config, run.state.params)


def timms_names(config: Config, params) -> dict[str, np.ndarray]:
  arrays = {path: np.array(leaf) for path, leaf, _ in named_leaves(params)}  # copies: the state is donated
  return timm_names.to_theirs(arrays, models.variant(config.model.name).depth, gate_inside=False)


@pytest.mark.parametrize("name, clipping", [("test_nfnet", 0.03), ("nf_resnet_tiny", 0.3)])
def test_one_step_of_timms_peer_is_one_step_of_ours(tmp_path, name, clipping):
  """The same weights and images: equal losses, parameters and averages after the step, AGC having clipped."""
  pytest.importorskip("torch")
  pytest.importorskip("timm")
  import safetensors.numpy

  from nfnets.measure import peer_timm

  config = tiny(
    model=ModelConfig(name=name, drop_rate=0.0, stochastic_depth=0.0, overrides={"dialect": "timm"}),
    optim=OptimConfig(base_lr=1.0, scale_lr=False, warmup_epochs=0, schedule="constant", weight_decay=1e-2, clipping=clipping),
  )
  run, before = filled_run(config)
  safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in before.items()}, tmp_path / "x")
  job = {**peers.work(config, size=32, classes=10), **peers.timm_network(config).job, "weights": str(tmp_path / "x")}
  theirs = peer_timm.start({**job, "compile": False})  # it takes its first step as it starts
  run.seconds_per_step(1)
  assert theirs.loss() == pytest.approx(run.check(), rel=1e-4)
  clipped = 0
  for ours, network in ((run.state.params, theirs.network), (run.state.ema[0], theirs.ema.module)):
    found = {name: array.detach().numpy() for name, array in network.state_dict().items()}
    expected = timms_names(config, ours)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
      assert np.linalg.norm(found[name] - array) <= 1e-3 * np.linalg.norm(array - before[name]) + 1e-7, name
  for name, weight in theirs.network.named_parameters():
    if name.endswith(".weight") and name != "head.fc.weight":
      norm = lambda x: np.linalg.norm(x.reshape(len(x), -1), axis=1)
      clipped += np.isclose(norm(weight.grad.numpy()), clipping * norm(before[name]), rtol=1e-3).sum()
  assert clipped > 100


def test_timm_is_compared_in_processes_of_their_own():
  pytest.importorskip("torch")
  pytest.importorskip("timm")
  report = peers.compare(tiny(), "timm", rounds=2, steps=1, warmup=1)
  assert report.ours.parameters == report.theirs.parameters and report.theirs.device == "cpu"
  assert len(report.round_ratios) == 2 and min(report.round_ratios) > 0
  assert {"timm", "torch"} <= report.theirs.versions.keys()
