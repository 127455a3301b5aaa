"""The training loop: from a configuration and a workdir to a trained network, resumable at any step."""
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import pprint
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from nfnets import optim
from nfnets.agc import agc_metrics
from nfnets.config import Config
from nfnets.data import loader, sources
from nfnets.data.pool import prefetch
from nfnets.train import diagnose, evaluate, losses, mesh as meshes, recipe, state as states, step as steps
from nfnets.train.checkpoint import Checkpoints, check_same_run, to_json
from nfnets.train.logbook import Logbook, results_table


class NonFiniteError(FloatingPointError):
  """The loss or a gradient was not finite; the message says at which step, where, and what the last good checkpoint is."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
  """What `train` hands back. results: the last evaluation, {"params": {"top1", …}, "ema": …}; empty if it was interrupted."""

  step: int
  finished: bool
  results: dict[str, dict[str, float]]


def train(config: Config, workdir: str) -> Result:
  """Trains as `config` says, from the newest checkpoint in `workdir` if there is one.

  Writes checkpoints, metrics.jsonl, tensorboard/, curves.png and config.json into `workdir`. SIGINT and SIGTERM save and return.
  Raises ValueError (with its subclasses DataError, CheckpointError and the models' own) for what a person can mend, and
  NonFiniteError.
  """
  with contextlib.ExitStack() as opened:
    return _train(config, workdir, opened)


def _train(config: Config, workdir: str, opened: contextlib.ExitStack) -> Result:
  # ---- what is to be trained, on what
  config.validate()
  mesh = meshes.make_mesh()
  meshes.check_batch(config.batch, mesh)
  data_config = recipe.data_config(config)
  progress = lambda line: print(line, flush=True)
  data, test_data = (opened.enter_context(contextlib.closing(sources.load(data_config, train=train, progress=progress)))
                     for train in (True, False))
  abstract = nnx.eval_shape(lambda: states.build_network(config.model, data.num_classes))
  steps_per_epoch = len(data) / config.batch
  total_steps = max(1, round(config.epochs * steps_per_epoch))
  graph, params, stats = states.split(abstract)
  schedule_args = {"batch": config.batch, "steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
  schedule = optim.make_schedule(config.optim, **schedule_args)
  optimizer = optim.make_optimizer(config.optim, params, **schedule_args)
  checkpoints = Checkpoints(workdir, keep=config.keep_checkpoints)
  found = checkpoints.latest()
  if found is not None:
    check_same_run(checkpoints.meta(found)["config"], config, workdir)
  shared = {"process": (jax.process_index(), jax.process_count()), "say": lambda text: log.say(text)}
  batches = loader.TrainBatches(data, data_config, batch=config.batch, seed=config.seed, **shared)
  opened.callback(batches.close)
  test_batches = loader.EvalBatches(test_data, data_config, batch=meshes.whole_batch(config.eval_batch, mesh), **shared)
  opened.callback(test_batches.close)

  # ---- the state, new or restored
  whole = meshes.replicated(mesh)
  if found is None:
    network = states.build_network(config.model, data.num_classes, seed=config.seed)
    graph, params, stats = states.split(network)
    state = jax.device_put(states.init_state(params, stats, optimizer, config), whole)
  else:
    like = jax.eval_shape(lambda p, s: states.init_state(p, s, optimizer, config), params, stats)
    state = checkpoints.restore(found, like, whole)
  step = int(state.step)
  train_step = steps.compile_over(mesh, steps.make_train_step(config, graph, optimizer), donate_state=True)
  eval_step = steps.compile_over(mesh, steps.make_eval_step(config, graph))

  # ---- say what is going to happen
  pathlib.Path(workdir, "config.json").write_text(json.dumps(to_json(config), indent=2) + "\n", encoding="utf-8")
  log = Logbook(workdir, start_step=step, total_steps=total_steps,
                train_label=f"train, labels smoothed {config.label_smoothing:g}" if config.label_smoothing else "train")
  log.say(pprint.pformat(config, width=120, sort_dicts=False))
  log.say(optim.describe_groups(params, config.optim))
  log.say(f"{config.model.name}, {sum(p.size for p in jax.tree.leaves(params)):,} parameters; {len(data):,} training and "
          f"{len(test_data):,} test images, {batches.size} and {test_batches.size} pixels a side, {data.num_classes} classes; "
          f"{total_steps:,} steps of {config.batch} images; {mesh.size} × {jax.devices()[0].device_kind} "
          f"({jax.process_count()} process), jax {jax.__version__}, {platform.node()}")
  if found is not None:
    log.say(f"resumed from {checkpoints.path(found)}" + (", which is the end of the training" if step >= total_steps else ""))

  def test(step: int, state: states.TrainState) -> dict[str, dict[str, float]]:
    weights = {"params": (state.params, state.stats), **({"ema": state.ema} if state.ema is not None else {})}
    results = evaluate.evaluate(eval_step, mesh, weights, test_batches)
    log.test(step, step / steps_per_epoch, results)
    return results

  periods = lambda step, every: int(step / steps_per_epoch / every + 1e-9)
  due = lambda every, step: step == total_steps or periods(step, every) > periods(step - 1, every)

  # ---- the loop
  results, pending, since = {}, [], time.perf_counter()
  untimed = 1  # steps in this window that the clock leaves out: the first, which compiles
  ahead = prefetch(batches.start, step, total_steps, then=lambda batch: meshes.put_batch(mesh, batch))
  waits = Waits(ahead, lambda: not pending or pending[-1]["count"].is_ready())
  try:
    with stop_on_signals() as stop, contextlib.closing(ahead):
      for batch in waits:
        jax.block_until_ready(pending[-3:-2])  # the device keeps two steps of work; more would only hold their batches
        with jax.transfer_guard("disallow"):  # nothing but the explicit batch goes to the device
          state, metrics = train_step(state, batch)
        step += 1
        pending.append(metrics)
        if untimed and len(pending) == 1:
          jax.block_until_ready(metrics)
          log.say(f"compiled in {time.perf_counter() - since:.0f} s")
          since = waits.restart()
        log.advance(step)
        test_due, save_due = due(config.eval_every, step), due(config.checkpoint_every, step)
        if step % config.log_every == 0 or test_due or save_due or stop or step == total_steps:
          _check_finite(config, graph, state, batches, mesh, checkpoints)
          seconds = (time.perf_counter() - since) / max(1, len(pending) - untimed)
          scalars, clip = _summary(config, state, pending, schedule, step, steps_per_epoch, seconds)
          scalars["data_wait"] = waits.share()
          if batches.corrupt:
            scalars["corrupt_records"] = len(batches.corrupt)
          log.train(step, scalars, clip, seconds)
          pending, untimed, since = [], 0, waits.restart()
        if save_due:
          checkpoints.save(state, config, num_classes=data.num_classes)
        if test_due and not stop:
          results = test(step, state)
        if stop:
          checkpoints.save(state, config, num_classes=data.num_classes)
          break
        if test_due or save_due:
          since = waits.restart()
      if step >= total_steps and not results and not stop:  # resumed at the end
        results = test(step, state)
      checkpoints.wait()  # while signals are still ours: the last write must not be lost to one
  finally:
    try:
      checkpoints.close()
    finally:
      picture = log.draw()
      log.close()
  finished = bool(results) and step >= total_steps
  if finished:
    log.console.print(results_table(f"{config.model.name} on {config.data.name}, {config.data.test_split} split", results))
  else:
    log.say(f"stopped by {stop[0]} at step {step} of {total_steps}; saved {checkpoints.path(step)}; "
            "the same command goes on from there")
  log.say(f"in {workdir}: metrics.jsonl, tensorboard/, checkpoints/{', ' + picture.name if picture else ''}")
  return Result(step=step, finished=finished, results=results)


class Waits:
  """Iterates over batches and measures how long the devices had nothing to do but wait for the next one."""

  def __init__(self, batches: Iterator[Any], idle: Callable[[], bool]):
    self._batches, self._idle = batches, idle
    self.restart()

  def __iter__(self) -> Iterator[Any]:
    while True:
      asked = time.perf_counter()
      try:
        batch = next(self._batches)
      except StopIteration:
        return
      if self._idle():  # devices that still have a step to compute did not wait
        self._waited += time.perf_counter() - asked
      yield batch

  def restart(self) -> float:
    """Starts a new window of time; the moment, by time.perf_counter."""
    self._waited, self._since = 0.0, time.perf_counter()
    return self._since

  def share(self) -> float:
    """Waiting's share of the time since the restart, in [0, 1]."""
    return min(1.0, self._waited / max(time.perf_counter() - self._since, 1e-9))


def _summary(config: Config, state: states.TrainState, pending: list[dict[str, Any]], schedule, step: int, steps_per_epoch: float,
             seconds_per_step: float) -> tuple[dict[str, float], dict[str, float]]:
  """(means over the pending steps, clip fraction of each layer's kernel at the last step)."""
  window = jax.device_get(pending)
  grad_norms = [metrics.pop("grad_norm") for metrics in window]
  means = losses.summarize({key: sum(metrics[key].item() for metrics in window) for key in window[0]})
  del means["count"]
  scalars = {"epoch": step / steps_per_epoch, **means, "lr": float(schedule(step - 1)), "grad_norm": float(np.mean(grad_norms)),
             "images_per_second": config.batch / seconds_per_step}
  clipping = agc_metrics(jax.device_get(state.opt_state.get("agc")))
  kernels = {path.removesuffix("/kernel"): float(entry["clip_fraction"])
             for path, entry in clipping.items() if path.endswith("/kernel")}
  if kernels:  # the mean over layers, as in the picture
    scalars["clip_fraction"] = float(np.mean(list(kernels.values())))
  return scalars, dict(sorted(kernels.items(), key=lambda item: _layer_order(item[0])))


def _layer_order(path: str) -> tuple:
  top, *rest = path.split("/")
  places = {"stem": 0, "blocks": 1, "final_conv": 2, "fc": 3}
  return places.get(top, 2), [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in rest]


def _check_finite(config: Config, graph: nnx.GraphDef, state: states.TrainState, batches: loader.TrainBatches, mesh,
                  checkpoints: Checkpoints) -> None:
  if not bool(state.halted):
    return
  step = int(state.step)  # the state is the one before this update, which is numbered from 0 as the schedule is
  try:
    where = diagnose.first_nonfinite(config, graph, state, meshes.put_batch(mesh, batches[step]))
  except jax.errors.JaxRuntimeError as error:  # looking at every layer needs more memory than training
    where = f"the layer could not be found ({str(error).splitlines()[0]})"
  checkpoints.wait()
  last = checkpoints.latest()
  raise NonFiniteError(f"loss or gradient not finite at step {step + 1}: {where}; last good checkpoint: "
                       f"{checkpoints.path(last) if last is not None else 'none yet'}")


@contextlib.contextmanager
def stop_on_signals() -> Iterator[list[str]]:
  """A list that gets the name of the first SIGINT or SIGTERM; a second one acts as if nobody listened."""
  received: list[str] = []
  before = {}

  def handle(number, frame):
    received.append(signal.Signals(number).name)
    os.write(2, f"\n{received[0]}: saving after this step; once more to end at once\n".encode())
    for each, handler in before.items():
      signal.signal(each, handler or signal.SIG_DFL)
  try:
    before |= {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
  except ValueError:  # not the main thread: signals are not ours to take
    pass
  try:
    yield received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler or signal.SIG_DFL)
