"""Trains from end to end on the real digits: records, resuming, signals, losses that are not finite, refused workdirs."""

import dataclasses
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading

import chex
import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from nfnets import optim
from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.data.batches.evaluation import EvalBatches
from nfnets.data.batches.training import TrainBatches
from nfnets.distributed import LOST
from nfnets.train import loop, recovery, run as training_run
from nfnets.train.checkpoints import manifest
from nfnets.train.checkpoints.errors import CheckpointError
from nfnets.train.checkpoints.reader import CheckpointReader
from nfnets.train.logs import window
from nfnets.train.logs.logbook import Logbook, read_jsonl
from nfnets.train.step import state as states

pytestmark = pytest.mark.usefixtures("two_devices")
ROOT = pathlib.Path(__file__).resolve().parents[2]

TINY = {
  "width": (16, 16),
  "group_width": 8,
  "stem_width": (4, 4, 8),
  "stem_strides": (1, 1, 1, 2),
  "stage_strides": (1, 2),
  "depth": (1, 1),
}


def tiny_config(**changes) -> Config:
  """Makes a run of 11.2 steps an epoch with everything on: two parts a batch, AGC, EMA, dropout, stochastic depth, shifts."""
  config = Config(
    model=ModelConfig(name="nfnet_tiny", drop_rate=0.2, stochastic_depth=0.2, overrides=dict(TINY)),
    data=DataConfig(name="digits", shift=1),
    optim=OptimConfig(base_lr=0.4, warmup_epochs=0.5, clipping=0.05, agc_track=True, ema_decay=0.9),
    batch=128,
    accumulate=2,
    eval_batch=100,
    epochs=2,
    log_every=5,
    eval_every=1,
    checkpoint_every=1,
  )
  return dataclasses.replace(config, **changes)


def final_arrays(workdir) -> list[np.ndarray]:
  """Returns the weights and averages of a run's last checkpoint, always in the same order."""
  config = tiny_config()
  graph, params, stats = states.split_network(states.build_network(config.model, 10))
  reader = CheckpointReader(str(workdir))
  return [np.asarray(x) for x in jax.tree.leaves(reader.restore_model(reader.choose(), params, stats))]


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
  """Lets runs of one configuration share a compiled step, as new processes would through JAX's cache, and trace it once."""
  steps = {}

  def train_step_over(config, mesh, *arguments):
    key = repr(dataclasses.replace(config, eval_batch=1, log_every=1)), mesh  # two fields that no training step reads
    if key not in steps:
      steps[key] = make(config, mesh, *arguments)
    return steps[key]

  make = training_run.train_step_over
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(training_run, "train_step_over", train_step_over)
    yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("uninterrupted")
  return workdir, loop.train(tiny_config(), str(workdir))


def test_a_run_learns_and_leaves_its_records(uninterrupted):
  workdir, result = uninterrupted
  assert result.finished and result.step == 22
  assert set(result.results) == {"params", "ema"}
  assert result.results["params"]["count"] == 360
  assert result.results["params"]["loss"] < np.log(10) - 0.1  # better than chance after two epochs
  records = read_jsonl(workdir / "metrics.jsonl")
  train = [record for record in records if record["kind"] == "train"]
  assert [record["step"] for record in records if record["kind"] == "test"] == [12, 22]
  assert train[-1]["step"] == 22 and train[-1]["loss"] < train[0]["loss"]
  assert all(0 <= value <= 1 for record in train for value in record["clip"].values())
  assert set(train[-1]) >= {"epoch", "loss", "top1", "top5", "lr", "grad_norm", "images_per_second", "clip_fraction", "clip"}
  assert "fc" not in train[-1]["clip"] and "blocks/0/conv1b" in train[-1]["clip"]
  for name in ("curves.png", "config.json", "tensorboard"):
    assert (workdir / name).exists()
  tags = {value.tag for event in read_events(workdir) for value in event.summary.value}
  assert tags >= {"train/loss", "test/ema_top1", "clip/blocks/0/conv1b"}


def test_stopped_five_times_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, monkeypatch, capsys):
  """After SIGTERM within a step, also at an epoch's end, images, keys, state and metrics go on to the bit."""
  original = TrainBatches.start
  one_by_one = lambda start, first, stop, then: (then(start(step).result()) for step in range(first, stop))
  monkeypatch.setattr(training_run, "prefetch", one_by_one)
  monkeypatch.setattr(Logbook, "draw", lambda self: None)  # six pictures take longer than all the steps
  stops = sorted({11, *random.Random(5).sample([*range(1, 11), *range(12, 20)], 4)})  # the first epoch is evaluated at step 12
  for at in stops:

    def interrupting(self, step, at=at):
      if step == at:
        os.kill(os.getpid(), signal.SIGTERM)
      return original(self, step)

    monkeypatch.setattr(TrainBatches, "start", interrupting)
    assert threading.current_thread() is threading.main_thread()
    ended = loop.train(tiny_config(), str(tmp_path))
    assert not ended.finished and ended.step == at + 1
  monkeypatch.setattr(TrainBatches, "start", original)
  ended = loop.train(tiny_config(), str(tmp_path))
  assert ended.finished and ended.results == uninterrupted[1].results
  assert re.findall(r"resumed from \S+/checkpoints/(\d+)", capsys.readouterr().out) == [str(at + 1) for at in stops]
  chex.assert_trees_all_equal(final_arrays(tmp_path), final_arrays(uninterrupted[0]))
  records, reference = (read_jsonl(workdir / "metrics.jsonl") for workdir in (tmp_path, uninterrupted[0]))
  steps = [record["step"] for record in records if record["kind"] == "train"]
  assert steps == sorted(set(steps))
  tests, expected = ([record for record in log if record["kind"] == "test"] for log in (records, reference))
  assert tests == expected and [record["step"] for record in tests] == [12, 22]


def test_a_finished_run_is_evaluated_again_and_not_trained(uninterrupted):
  workdir, result = uninterrupted
  before = final_arrays(workdir)
  again = loop.train(tiny_config(), str(workdir))
  assert again.finished and again.results == result.results
  chex.assert_trees_all_equal(before, final_arrays(workdir))


def test_another_configurations_workdir_is_refused(uninterrupted):
  workdir, _ = uninterrupted
  config = tiny_config(seed=1)
  with pytest.raises(CheckpointError, match="config.seed was 0, is 1"):
    loop.train(config, str(workdir))
  config = tiny_config()
  config.optim.clipping = 0.01
  with pytest.raises(CheckpointError, match="config.optim.clipping was 0.05, is 0.01"):
    loop.train(config, str(workdir))


def test_fields_that_change_nothing_may_differ(uninterrupted):
  workdir, result = uninterrupted
  config = tiny_config(log_every=3, eval_batch=16)  # which another test compiles too
  again = loop.train(config, str(workdir))
  assert again.results["params"]["top1"] == result.results["params"]["top1"]
  assert again.results["params"]["loss"] == pytest.approx(result.results["params"]["loss"], rel=1e-5)


def test_a_finished_run_can_be_prolonged(uninterrupted, tmp_path, capsys):
  shutil.copytree(uninterrupted[0], tmp_path / "run")
  longer = loop.train(tiny_config(epochs=3), str(tmp_path / "run"))
  assert longer.finished and longer.step == 34
  said = capsys.readouterr().out
  assert (
    "config.epochs was 2, is 3: the learning rate follows the schedule of the new length" in said and "checkpoints/22" in said
  )


def diverging_config(**changes) -> Config:
  """Makes a run whose learning rate is far too high after a few steps."""
  optimizer = OptimConfig(base_lr=1e4, warmup_epochs=0.25, clipping=None, ema_decay=None)
  return tiny_config(accumulate=1, epochs=4, optim=optimizer, **changes)


def test_a_loss_that_is_not_finite_stops_with_step_layer_and_checkpoint(tmp_path):
  config = diverging_config(checkpoint_every=0.25)
  with pytest.raises(loop.NonFiniteError) as error:
    loop.train(config, str(tmp_path))
  message = str(error.value)
  records = read_jsonl(tmp_path / "metrics.jsonl")
  assert "not finite at step" in message and "first layer whose" in message
  assert "checkpoint: " in message
  assert all(np.isfinite(record["loss"]) for record in records)
  assert json.loads((tmp_path / "config.json").read_text())["optim"]["base_lr"] == 1e4


def test_an_update_that_overflows_is_never_saved(tmp_path):
  """Rate and decay are the highest allowed: parameters grow by 1e7 a step, until the step refuses to go on."""
  config = tiny_config(accumulate=1, checkpoint_every=0.1, epochs=1)
  config.optim = OptimConfig(base_lr=1e4, weight_decay=1e3, warmup_epochs=0.1, clipping=None, ema_decay=None, momentum=0)
  with pytest.raises(loop.NonFiniteError, match="learning rate is too high|not finite"):
    loop.train(config, str(tmp_path))
  reader = CheckpointReader(str(tmp_path))
  graph, params, stats = states.split_network(states.build_network(config.model, 10))
  for step in reader.steps()[-1:]:
    chex.assert_tree_all_finite(reader.restore_model(step, params, stats))


def test_the_logged_learning_rate_is_that_of_the_updates_made(tmp_path):
  """A skipped step makes no update and a rolled-back one is made again, as the optimizer's own count of updates shows."""
  config = tiny_config()
  schedule = optim.make_schedule(config.optim, batch=128, steps_per_epoch=11, total_steps=22)
  network = states.build_network(config.model, 10)
  _, params, stats = states.split_network(network)
  optimizer = optim.make_optimizer(config.optim, params, batch=128, steps_per_epoch=11, total_steps=22)
  state = states.init_state(params, stats, optimizer, config)
  count = state.opt_state["learning_rate"]._replace(count=np.int32(7))
  changed = {"step": np.int32(9), "bad_steps": np.int32(2), "opt_state": {**state.opt_state, "learning_rate": count}}
  metrics = {"bad": np.bool_(False), "grad_norm": np.float32(1)}
  sums = {name: np.float32(1) for name in ("loss_sum", "top1", "top5", "count")}
  scalars, _ = window.summarize(config, dataclasses.replace(state, **changed), [metrics | sums], schedule, 11.0)
  assert scalars["lr"] == float(schedule(6)) and scalars["epoch"] == 9 / 11 and scalars["bad_steps"] == 2


@pytest.mark.parametrize("fields, logged", [({}, True), ({"agc_track": False}, False), ({"clipping": None}, False)])
def test_clip_fractions_are_logged_where_agc_is_tracked(fields, logged):
  config = tiny_config()
  config.optim = dataclasses.replace(config.optim, **fields)
  _, params, stats = states.split_network(states.build_network(config.model, 10))
  optimizer = optim.make_optimizer(config.optim, params, batch=128, steps_per_epoch=11, total_steps=22)
  metrics = {name: np.float32(1) for name in ("loss_sum", "top1", "top5", "count", "grad_norm")} | {"bad": np.bool_(False)}
  state = states.init_state(params, stats, optimizer, config)
  scalars, layers = window.summarize(config, state, [metrics], lambda step: 0.1, 11.0)
  assert ("clip_fraction" in scalars) == bool(layers) == logged


def test_an_evaluation_ends_early_when_a_signal_comes_and_is_made_by_the_next_run(uninterrupted, tmp_path, monkeypatch):
  """A signal during an evaluation is not kept waiting for its end: the step is saved, and the next run evaluates it."""
  start = EvalBatches.start

  def interrupting(self, step):
    if step == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    return start(self, step)

  monkeypatch.setattr(EvalBatches, "start", interrupting)
  config = tiny_config(eval_batch=16)  # 23 batches
  for _ in range(2):  # the second signal comes while the next run makes that evaluation
    ended = loop.train(config, str(tmp_path))
    assert not ended.finished and ended.step == 12 and CheckpointReader(str(tmp_path)).metrics(12) is None
  monkeypatch.setattr(EvalBatches, "start", start)
  again = loop.train(config, str(tmp_path))
  assert again.finished and CheckpointReader(str(tmp_path)).metrics(12) is not None
  assert again.results["params"]["top1"] == uninterrupted[1].results["params"]["top1"]
  tests = [record for record in read_jsonl(tmp_path / "metrics.jsonl") if record["kind"] == "test"]
  assert [record["step"] for record in tests] == [12, 22]


def test_an_error_of_a_save_does_not_hide_why_the_run_ended(tmp_path, monkeypatch):
  monkeypatch.setattr(manifest, "write", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
  config = diverging_config(checkpoint_every=0.1)
  with pytest.raises(loop.NonFiniteError):
    loop.train(config, str(tmp_path))


def test_a_process_that_cannot_look_for_the_bad_layer_keeps_the_others_from_waiting(monkeypatch):
  """A process enters the program that looks at every layer only if all processes can."""
  asked = []
  monkeypatch.setattr(recovery.distributed, "any_process", lambda flag: asked.append(flag) or True)
  config = tiny_config()
  graph, params, stats = states.split_network(states.build_network(config.model, 10))
  optimizer = optim.make_optimizer(config.optim, params, batch=128, steps_per_epoch=11, total_steps=22)
  state = states.init_state(params, stats, optimizer, config)

  def broken():
    raise OSError("the disk is gone")

  assert recovery.first_nonfinite(config, graph, state, broken) == "the layer could not be found (the disk is gone)"
  batch = {"image": np.zeros((4, 8, 8, 3), np.uint8), "label": np.zeros(4, np.int32)}
  said = recovery.first_nonfinite(config, graph, state, lambda: batch)
  assert said == "the layer could not be found (another process could not look)" and asked == [True, False]


def test_waiting_for_data_is_hinted_at_once(tmp_path, capsys):
  log = Logbook(str(tmp_path))
  log.begin(0, 10)
  scalars = {"epoch": 0.1, "loss": 1.0, "top1": 0.5, "lr": 0.1, "images_per_second": 10.0}
  for step, share in ((1, 0.04), (2, 0.5), (3, 0.5)):
    log.train(step, {**scalars, "data_wait": share}, {}, 1.0)
  log.close()
  said = capsys.readouterr().out
  assert said.count("the devices waited for data 50% of the time") == 1 and "data_wait 4%" in said


@pytest.mark.filterwarnings("ignore:Exception ignored")  # tensorboardX leaves a file open that it cannot flush
def test_a_full_disk_does_not_end_the_training(tmp_path, capsys):
  """While files cannot grow (RLIMIT_FSIZE) nothing is written; as soon as they can, what was missing is written too."""
  log = Logbook(str(tmp_path))
  log.begin(0, 10)
  scalars, clip = {"epoch": 0.1, "loss": 1.0, "top1": 0.5, "lr": 0.1}, {f"blocks/{i}/conv1": 0.25 for i in range(100)}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
  try:
    for step in range(1, 20):
      log.train(step, scalars, clip, 1.0)
      log.sync()
    log.rewind(18)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  log.train(19, scalars, {"stem/conv0": 0.25}, 1.0)
  log.close()
  said = capsys.readouterr().out
  assert all(f"{name} cannot be written: File too large; training goes on" in said for name in ("metrics.jsonl", "tensorboard"))
  assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [*range(1, 20)]
  assert {value.tag: value.simple_value for value in read_events(tmp_path)[-1].summary.value} == pytest.approx(
    {"train/epoch": 0.1, "train/loss": 1, "train/top1": 0.5, "train/lr": 0.1, "clip/stem/conv0": 0.25}
  )


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_gone_does_not_end_the_training(tmp_path, stream):
  """The output may close early, as Ctrl-C does it in `… | tee log`: the run still saves and ends with status 75."""
  program = (
    "import os, signal, sys; from nfnets.train.logs.logbook import Logbook\n"
    "from nfnets.distributed.signals import stop_on_signals\n"
    "with stop_on_signals() as stop:\n"
    "  log = Logbook(sys.argv[1])\n"
    "  log.begin(0, 10)\n"
    "  sys.stdin.read()\n"
    "  os.kill(os.getpid(), signal.SIGINT)\n"
    "  log.say('x' * 100_000)\n"
    "  log.close()\n"
    "  sys.exit(75 if stop.name == 'SIGINT' else 1)"
  )
  running = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, **{stream: subprocess.PIPE})
  getattr(running, stream).close()
  running.stdin.close()
  assert running.wait(60) == 75


def read_events(workdir) -> list[Event]:
  """Reads the last event file, whose records are a length, its checksum, the data and their checksum."""
  path = max((workdir / "tensorboard").glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns)
  data, events = path.read_bytes(), []
  while data:
    end = 12 + struct.unpack("<Q", data[:8])[0]
    events.append(Event.FromString(data[12:end]))
    data = data[end + 4 :]
  return events


def test_the_watchdog_ends_a_run_that_waits_for_its_first_image(tmp_path):
  """A disk that never answers: the first batch gets the usual seconds, and not those of a compilation."""
  program = (
    "import sys, time\nfrom nfnets.train import loop\nfrom nfnets.data.batches.training import TrainBatches\n"
    "from tests.train.test_loop import tiny_config\n"
    "TrainBatches.start = lambda self, step: time.sleep(60)\n"
    "loop.train(tiny_config(watchdog=1.0), sys.argv[1])"
  )
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  ended = subprocess.run(
    [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
  )
  assert ended.returncode == LOST and "error: the images of step 1 took longer than config.watchdog=1 s" in ended.stderr
