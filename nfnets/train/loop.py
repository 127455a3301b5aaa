"""The training loop: from a configuration and a workdir to a trained network, resumable at any step."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import platform
import pprint
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from nfnets import distributed, optim
from nfnets.agc import agc_metrics
from nfnets.config import Config
from nfnets.data.batches.evaluation import EvalBatches
from nfnets.data.batches.prefetch import prefetch
from nfnets.data.batches.training import TrainBatches, shuffle_block
from nfnets.data.sources.base import Source
from nfnets.data.sources.open import open_source
from nfnets.distributed.signals import stop_on_signals
from nfnets.distributed.watchdog import FIRST_STEP, Watchdog
from nfnets.train import evaluate, resolve
from nfnets.train.checkpoints import compatibility
from nfnets.train.checkpoints.store import Checkpoints
from nfnets.train.logs.logbook import Logbook, Silence
from nfnets.train.logs.window import Waits
from nfnets.train.recovery import first_nonfinite
from nfnets.train.step import losses, sharding
from nfnets.train.step.gradients import rows_normalized
from nfnets.train.step.state import TrainState, build_network, init_state, split_network
from nfnets.train.step.step import eval_step_over, train_step_over


class NonFiniteError(FloatingPointError):
  """A loss or gradient was not finite, or the loss too high; the message says at which step, where, and the last checkpoint."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
  """What `train` hands back. results: the last evaluation, {"params": {"top1", …}, "ema": …}; empty if it was interrupted."""

  step: int
  finished: bool
  results: dict[str, dict[str, float]]


def train(config: Config, workdir: str) -> Result:
  """Trains as `config` says, from the newest good checkpoint in `workdir` if there is one.

  Writes checkpoints, metrics.jsonl, tensorboard/, curves.png and config.json into `workdir`. SIGINT and SIGTERM, to one process
  or all, save and return. Raises ValueError (with its subclasses DataError, CheckpointError, ProcessError and the models' own)
  for what a person can mend, and NonFiniteError.
  """
  with contextlib.ExitStack() as opened:
    return _train(config, workdir, opened)


def _train(config: Config, workdir: str, opened: contextlib.ExitStack) -> Result:
  # ---- what is to be trained, on what
  config.validate()
  process, count = jax.process_index(), jax.process_count()
  mesh = sharding.make_mesh()
  sharding.check_batch(config.batch, mesh, config.accumulate)
  data_config = resolve.data_config(config)
  tell = functools.partial(print, flush=True) if process == 0 else lambda line: None
  data, test_data = (
    opened.enter_context(contextlib.closing(open_source(data_config, split, progress=tell)))
    for split in (data_config.train_split, data_config.test_split)
  )
  distributed.require_equal(
    {"config": json.dumps(compatibility.to_json(config)), "data": _fingerprint(data), "test data": _fingerprint(test_data)}, tell
  )
  abstract = nnx.eval_shape(lambda: build_network(config.model, data.num_classes))
  steps_per_epoch = len(data) / config.batch
  total_steps = max(1, round(config.epochs * steps_per_epoch))
  graph, params, stats = split_network(abstract)
  schedule_args = {"batch": config.batch, "steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
  schedule = optim.make_schedule(config.optim, **schedule_args)
  optimizer = optim.make_optimizer(config.optim, params, **schedule_args)
  like = sharding.place(mesh, jax.eval_shape(lambda p, s: init_state(p, s, optimizer, config), params, stats), shard=config.shard)
  log: Logbook | Silence = Silence()
  warn = lambda text: log.warn(text)
  checkpoints = Checkpoints(
    workdir, keep=config.keep_checkpoints, keep_every=config.keep_every, keep_best=config.keep_best, say=warn
  )
  opened.callback(checkpoints.close)
  found = checkpoints.choose()
  order = {"shuffle_block": shuffle_block(data_config, data), "rows": rows_normalized(config, stats, mesh.size)}
  if found is not None:
    compatibility.check_same_run(checkpoints.meta(found)["config"], config, workdir)
    compatibility.check_same_data(
      checkpoints.meta(found), config, workdir, records=len(data), num_classes=data.num_classes, **order
    )
  shared = {"process": (process, count), "say": warn}
  batches = TrainBatches(data, data_config, batch=config.batch, seed=config.seed, **shared)
  opened.callback(batches.close)
  test_batches = EvalBatches(test_data, data_config, batch=sharding.whole_batch(config.eval_batch, mesh), **shared)
  opened.callback(test_batches.close)

  # ---- the state, new or restored
  if found is None:
    network = build_network(config.model, data.num_classes, seed=config.seed)
    state = sharding.put(init_state(*split_network(network)[1:], optimizer, config), like)
    del network
  else:
    state = checkpoints.restore(found, like)
  step, passed_over = int(state.step), int(state.passed_over)
  train_step = train_step_over(config, mesh, graph, optimizer, like)
  eval_step = eval_step_over(config, mesh, graph)

  # ---- say what is going to happen
  label = f"train, labels smoothed {config.label_smoothing:g}" if config.label_smoothing else "train"
  if process == 0:
    log = Logbook(workdir, start_step=step, total_steps=total_steps, train_label=label)
    opened.callback(log.close)
    pathlib.Path(workdir, "config.json").write_text(json.dumps(compatibility.to_json(config), indent=2) + "\n", encoding="utf-8")
  log.say(pprint.pformat(config, width=120, sort_dicts=False))
  log.say(optim.describe_groups(params, config.optim))
  log.say(
    f"{config.model.name}, {sum(p.size for p in jax.tree.leaves(params)):,} parameters; {len(data):,} training and "
    f"{len(test_data):,} test images, {batches.size} and {test_batches.size} pixels a side, {data.num_classes} classes; "
    f"{total_steps:,} steps of {config.batch} images; {mesh.size} × {jax.devices()[0].device_kind} "
    f"({count} process{'es' * (count > 1)}), jax {jax.__version__}, {platform.node()}"
  )
  if found is not None:
    log.say(f"resumed from {checkpoints.path(found)}" + (", which is the end of the training" if step >= total_steps else ""))
  watchdog = Watchdog(config.watchdog, workdir, process)
  opened.callback(watchdog.close)

  def test(step: int, state: TrainState) -> dict[str, dict[str, float]]:
    weights = {"params": (state.params, state.stats), **({"ema": state.ema} if state.ema is not None else {})}
    kick = lambda images: watchdog.kick(f"the evaluation at step {step}, after {images} images,")
    results = evaluate.evaluate(eval_step, mesh, weights, test_batches, progress=kick)
    log.test(step, step / steps_per_epoch, results)
    return results

  def send(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    host = np.zeros((len(mesh.local_devices), 2), np.int32)
    host[0] = bool(stop), len(batches.corrupt)
    return sharding.put_batch(mesh, {**batch, "host": host})

  def save(state: TrainState, results: dict[str, dict[str, float]] | None = None) -> None:
    log.sync()
    checkpoints.save(state, config, num_classes=data.num_classes, records=len(data), results=results, **order)
    watchdog.kick(f"the step after {int(state.step)}")

  periods = lambda step, every: int(step / steps_per_epoch / every + 1e-9)
  due = lambda every, step: step == total_steps or periods(step, every) > periods(step - 1, every)

  # ---- the loop
  results, pending, since = {}, [], time.perf_counter()
  untimed = 1  # steps in this window that the clock leaves out: the first, which compiles
  under_way = collections.deque(maxlen=3)  # metrics of the last steps; the devices keep two steps of work
  stopping, rolled_back = False, True
  with stop_on_signals() as stop:
    if found is not None and due(config.eval_every, step) and not checkpoints.evaluated(step):  # a signal came before that
      results = test(step, state)
      checkpoints.add_metrics(step, results)
      watchdog.kick("the first step", FIRST_STEP)
      since = time.perf_counter()
    while rolled_back:
      rolled_back = False
      ahead = prefetch(lambda at: batches.start(at + passed_over), step, total_steps, then=send)  # noqa: B023
      waits = Waits(ahead, lambda: not under_way or under_way[-1]["count"].is_ready())
      with contextlib.closing(ahead):
        for batch in waits:
          if len(under_way) == under_way.maxlen:  # more would only hold their batches
            jax.block_until_ready(under_way[0])
            watchdog.kick(f"step {step - 1}")
          # one process goes by what it hears itself; several by what all have heard through a step that has ended
          stopping = bool(stop) if count == 1 else len(under_way) == under_way.maxlen and bool(under_way[0]["stop"])
          with jax.transfer_guard("disallow"):  # nothing but the explicit batch goes to the device
            state, metrics = train_step(state, batch)
          step += 1
          pending.append(metrics)
          under_way.append(metrics)
          if untimed and len(pending) == 1:
            jax.block_until_ready(metrics)
            watchdog.kick(f"step {step + 1}")
            log.say(f"compiled in {time.perf_counter() - since:.0f} s")
            since = waits.restart()
          log.advance(step)
          test_due, save_due = due(config.eval_every, step), due(config.checkpoint_every, step)
          if step % config.log_every == 0 or test_due or save_due or stopping or step == total_steps:
            jax.block_until_ready(metrics)
            if bool(state.halted):
              state = _roll_back(config, graph, state, pending, batches, mesh, checkpoints, like, log)
              step, passed_over = int(state.step), int(state.passed_over)
              log.rewind(step)
              pending, rolled_back, since = [], True, waits.restart()
              under_way.clear()
              break
            timed = len(pending) - untimed
            seconds = (time.perf_counter() - since) / timed if timed else None
            window = jax.device_get(pending)
            scalars, clip = _summary(config, state, window, schedule, step, steps_per_epoch, seconds)
            _check_bad_steps(config, state, window, step, log)
            log.train(step, {**scalars, "data_wait": waits.share()}, clip, seconds)
            pending, untimed, since = [], 0, waits.restart()
          if test_due and not stopping:
            results = test(step, state)
          if save_due or stopping:
            save(state, results if test_due and not stopping else None)
          if stopping:
            break
          if test_due or save_due:
            since = waits.restart()
    if step >= total_steps and not results and not stopping:  # resumed at the end
      results = test(step, state)
    watchdog.kick("the last checkpoint")
    checkpoints.close()  # while signals are still ours: the last write must not be lost to one
  picture = log.draw()
  finished = step >= total_steps and not stopping
  if finished:
    log.console.print(
      evaluate.results_table(f"{config.model.name} on {config.data.name}, {config.data.test_split} split", results)
    )
  else:
    log.say(
      f"stopped by {stop[0] if stop else 'a signal to another process'} at step {step} of {total_steps}; saved "
      f"{checkpoints.path(step)}; the same command goes on from there"
    )
  log.say(f"in {workdir}: metrics.jsonl, tensorboard/, checkpoints/{', ' + picture.name if picture else ''}")
  return Result(step=step, finished=finished, results=results)


def _fingerprint(data: Source) -> str:
  """What two processes' data must have in common, as JSON; looks at names and lengths, not at images."""
  classes = hashlib.sha256("\n".join(data.class_names).encode()).hexdigest()[:12]
  first = data.address(0).rpartition(os.sep)[2]
  return json.dumps({"name": data.name, "split": data.split, "records": len(data), "classes": classes, "first record": first})


def _summary(
  config: Config,
  state: TrainState,
  window: list[dict[str, Any]],
  schedule,
  step: int,
  steps_per_epoch: float,
  seconds_per_step: float | None,
) -> tuple[dict[str, float], dict[str, float]]:
  """(means over the window's steps that were not bad, clip fraction of each layer's kernel at the last step)."""
  good = [metrics for metrics in window if not metrics["bad"]] or window
  sums = {key: sum(metrics[key].item() for metrics in good) for key in ("loss_sum", "top1", "top5", "count")}
  means = losses.summarize(sums)
  del means["count"]
  skipped = int(state.bad_steps) if config.on_bad_step == "skip" else 0  # the schedule counts updates
  scalars = {
    "epoch": step / steps_per_epoch,
    **means,
    "lr": float(schedule(step - 1 - skipped)),
    "grad_norm": float(np.mean([metrics["grad_norm"] for metrics in good])),
  }
  if seconds_per_step:  # not for a window of the first step alone, which compiled
    scalars["images_per_second"] = config.batch / seconds_per_step
  if corrupt := int(window[-1]["corrupt"]):
    scalars["corrupt_records"] = corrupt
  if bad := int(state.bad_steps):
    scalars["bad_steps"] = bad
  clipping = agc_metrics(jax.device_get(state.opt_state.get("agc")))
  kernels = {
    path.removesuffix("/kernel"): float(entry["clip_fraction"]) for path, entry in clipping.items() if path.endswith("/kernel")
  }
  if kernels:  # the mean over layers, as in the picture
    scalars["clip_fraction"] = float(np.mean(list(kernels.values())))
  return scalars, dict(sorted(kernels.items(), key=lambda item: _layer_order(item[0])))


def _layer_order(path: str) -> tuple:
  top, *rest = path.split("/")
  places = {"stem": 0, "blocks": 1, "final_conv": 2, "fc": 3}
  return places.get(top, 2), [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in rest]


def _check_bad_steps(config: Config, state: TrainState, window: list[dict[str, Any]], step: int, log: Logbook) -> None:
  """Says which steps of the window were skipped. Raises NonFiniteError where there have been too many."""
  total = int(state.bad_steps)
  for back, metrics in enumerate(reversed(window)):
    if metrics["bad"]:
      log.warn(
        f"step {step - back} skipped: loss {metrics['loss_sum'] / metrics['count']:.4g}, gradient norm "
        f"{metrics['grad_norm']:.4g}; {total} bad step{'s' * (total > 1)} so far"
      )
  if config.on_bad_step == "skip" and total > config.max_bad_steps:
    raise NonFiniteError(f"{total} bad steps up to step {step}, more than config.max_bad_steps={config.max_bad_steps}")


def _roll_back(
  config: Config,
  graph: nnx.GraphDef,
  state: TrainState,
  pending: list[dict[str, Any]],
  batches: TrainBatches,
  mesh,
  checkpoints: Checkpoints,
  like: TrainState,
  log: Logbook,
) -> TrainState:
  """The last checkpoint's state, to go on with the batches that follow the bad one.

  Raises NonFiniteError where that is not asked for, or was done too often, or there is no checkpoint.
  """
  step, bad = int(state.step), int(state.bad_steps)  # `step` is the bad one, counted from 0 as the schedule does
  taken = step + int(state.passed_over)
  what = _what_was_bad(
    config,
    graph,
    state,
    next(metrics for metrics in jax.device_get(pending) if metrics["bad"]),
    lambda: sharding.put_batch(mesh, batches[taken]),
  )
  last = checkpoints.choose()
  saved = f"last good checkpoint: {checkpoints.path(last) if last is not None else 'none yet'}"
  if config.on_bad_step == "rollback" and bad > config.max_bad_steps:
    saved = f"rolled back {bad - 1} times before, as often as config.max_bad_steps={config.max_bad_steps} allows; {saved}"
  elif config.on_bad_step == "rollback" and last is not None:
    log.warn(f"{what}; back to step {last}, on with other images (time {bad} of at most {config.max_bad_steps})")
    numbers = {"bad_steps": np.int32(bad), "passed_over": np.int32(taken + 1 - last)}
    restored = checkpoints.restore(last, like)
    return dataclasses.replace(restored, **{name: sharding.put(value, getattr(like, name)) for name, value in numbers.items()})
  raise NonFiniteError(f"{what}; {saved}")


def _what_was_bad(config: Config, graph: nnx.GraphDef, state: TrainState, metrics: dict[str, Any], batch) -> str:
  loss, mean, step = metrics["loss_sum"] / metrics["count"], float(state.loss_mean), int(state.step) + 1
  if np.isfinite(loss) and 0 < config.spike * mean < loss:
    return f"loss {loss:.4g} at step {step} is above config.spike={config.spike:g} × its running mean {mean:.4g}"
  try:
    where = first_nonfinite(config, graph, state, batch())
  except jax.errors.JaxRuntimeError as error:  # looking at every layer needs more memory than training
    where = f"the layer could not be found ({str(error).splitlines()[0]})"
  return f"loss or gradient not finite at step {step}: {where}"
