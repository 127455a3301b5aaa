"""A training run, assembled and opened: data, network, compiled steps, checkpoints and records, and what moves as it trains."""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import platform
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from nfnets import distributed, optim
from nfnets.config import Config, DataConfig, text
from nfnets.data.batches.evaluation import EvalBatches
from nfnets.data.batches.prefetch import prefetch
from nfnets.data.batches.training import TrainBatches, shuffle_block
from nfnets.data.errors import DataError
from nfnets.data.sources.base import Source
from nfnets.data.sources.open import open_source
from nfnets.distributed.signals import StopRequest
from nfnets.distributed.watchdog import FIRST_STEP_S, Watchdog
from nfnets.errors import UserError
from nfnets.files import write_file
from nfnets.models import loops
from nfnets.train import resolve
from nfnets.train.checkpoints.compatibility import RunFacts, check_same_data, check_same_order, check_same_run, to_json
from nfnets.train.checkpoints.reader import CheckpointReader
from nfnets.train.checkpoints.retention import period
from nfnets.train.checkpoints.writer import CheckpointWriter
from nfnets.train.evaluate import Results, evaluate
from nfnets.train.initial import initial_network
from nfnets.train.lock import workdir_lock
from nfnets.train.logs.logbook import Logbook
from nfnets.train.logs.window import Metrics
from nfnets.train.step import sharding
from nfnets.train.step.gradients import rows_ascended, rows_normalized
from nfnets.train.step.state import TrainState, build_network, first_state, split_for_training, state_shapes
from nfnets.train.step.step import eval_step_over, train_step_over

STEPS_UNDER_WAY = 3  # the devices keep two steps of work; more would only hold their batches


@dataclasses.dataclass(slots=True, kw_only=True)
class Run:
  """Everything that the training loop works with; `open_run` makes it.

  What moves: `state`, `step` (updates done, those left out included), `passed_over` (batches that rollbacks left out), `corrupt`
  (the numbers of the records that any process has found corrupt) and `told` (those and the ones that this process has sent with
  a batch, though its step may still be under way, or never be taken because of a rollback).
  """

  config: Config
  workdir: str
  mesh: Mesh
  data: Source
  test_data: Source
  batches: TrainBatches
  test_batches: EvalBatches
  graph: nnx.GraphDef
  schedule: optax.Schedule  # update, from 0 → learning rate
  like: TrainState  # shapes and shardings of the state
  train_step: Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]
  eval_step: Callable[[nnx.State, nnx.State, dict[str, jax.Array]], Metrics]
  reader: CheckpointReader
  writer: CheckpointWriter
  log: Logbook
  watchdog: Watchdog
  steps_per_epoch: float
  total_steps: int
  resumed_from: int | None  # the step of the checkpoint that the run goes on from

  state: TrainState
  step: int
  passed_over: int
  corrupt: set[int]
  told: set[int] = dataclasses.field(default_factory=set)
  stop: StopRequest = dataclasses.field(default_factory=StopRequest)
  under_way: collections.deque[Metrics] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=STEPS_UNDER_WAY))
  has_compiled: bool = False  # the training step
  evaluated_before: bool = False

  # ---- one step

  def batches_from_here(self) -> Generator[dict[str, jax.Array], None, None]:
    """The batches of the steps to come, on the devices, prepared ahead by a thread; to be closed."""
    shift, self.told = self.passed_over, set(self.corrupt)
    return prefetch(lambda step: self.batches.start(step + shift), self.step, self.total_steps, then=self._send)

  def _send(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Sends a batch to the devices, with what this process tells the others: see `make_train_step`."""
    corrupt = np.zeros(len(self.mesh.local_devices), np.int32)
    for record in set(self.batches.corrupt) - self.told:  # one for each batch
      self.told.add(record)
      corrupt[0] = record + 1
      break
    return sharding.put_batch(self.mesh, {**batch, "stop": np.full_like(corrupt, bool(self.stop)), "corrupt": corrupt})

  def wait_for_room(self) -> None:
    """Waits until no more than two steps are under way."""
    if len(self.under_way) == self.under_way.maxlen:
      jax.block_until_ready(self.under_way[0])
      self.watchdog.expect(f"step {self.step - 1}")

  def is_stopping(self) -> bool:
    """Whether all processes are to stop after the next step.

    One process stops at its own signal. Several go by what a step that has ended told all of them, so that all stop at the same
    step.
    """
    if jax.process_count() == 1:
      return bool(self.stop)
    return len(self.under_way) == self.under_way.maxlen and bool(self.under_way[0]["stop"])

  def take_step(self, batch: dict[str, jax.Array]) -> Metrics:
    """Hands the devices one step; returns its metrics, which are still to be computed."""
    with jax.transfer_guard("disallow"):  # nothing but the explicit batch goes to the devices
      self.state, metrics = self.train_step(self.state, batch)
    self.step += 1
    self.under_way.append(metrics)
    self.log.advance(self.step)
    return metrics

  def is_due(self, every: float) -> bool:
    """Whether something that happens every so many epochs is due after the current step; at the end everything is."""
    epoch = lambda step: step / self.steps_per_epoch
    return self.step == self.total_steps or period(epoch(self.step), every) > period(epoch(self.step - 1), every)

  def note_corrupt(self, window: list[Metrics]) -> None:
    """Adds the records that any process found corrupt."""
    numbers = np.concatenate([metrics["corrupt"] for metrics in window])
    self.corrupt |= {int(number) - 1 for number in numbers[numbers > 0]}

  def check_corrupt(self) -> None:
    """Raises DataError, in all processes, where too many records are corrupt."""
    limit = self.config.data.max_corrupt
    if len(self.corrupt) > limit * len(self.data):
      raise DataError(
        f"{len(self.corrupt)} of the {len(self.data):,} records of {self.data.name} are corrupt, more than "
        f"config.data.max_corrupt={limit:g} allows"
      )

  # ---- evaluation and checkpoints

  def evaluate(self) -> Results | None:
    """Evaluates the parameters and their average, and writes the result down; None where a signal ended it before."""
    weights = {"params": (self.state.params, self.state.stats), **({"ema": self.state.ema} if self.state.ema is not None else {})}
    self.watchdog.expect(
      f"the evaluation at step {self.step}", 0.0 if self.evaluated_before else FIRST_STEP_S
    )  # the first one compiles
    results = evaluate(
      self.eval_step,
      self.mesh,
      weights,
      self.test_batches,
      progress=lambda images: self.watchdog.expect(f"the evaluation at step {self.step}, after {images} images,"),
      stopping=lambda: bool(self.stop),
    )
    self.evaluated_before = True
    if results is not None:
      self.log.test(self.step, self.step / self.steps_per_epoch, results)
    return results

  def save(self, results: Results | None = None) -> None:
    """Saves the state in the background. results: its evaluation, if there was one."""
    self.log.sync()
    digest = self.batches.order_digest(self.step + self.passed_over)
    self.writer.save(self.state, results=results, order_digest=digest, corrupt=tuple(sorted(self.corrupt)))
    self.watchdog.expect(f"the step after {self.step}")

  def restore(self, step: int, **changes: Any) -> None:
    """Goes on from a checkpoint; changes: fields of the state to take instead of the saved ones."""
    self.state = dataclasses.replace(restored(self.reader, step, self.mesh, self.like, self.config), **changes)
    self.writer.go_on_from(step)
    self.step, self.passed_over = int(self.state.step), int(self.state.passed_over)
    self.under_way.clear()


def restored(reader: CheckpointReader, step: int, mesh: Mesh, like: TrainState, config: Config) -> TrainState:
  """The state saved at `step` as training takes it: checkpoints hold every block by itself, and training may hold stacks."""
  runs = loops.runs_of(like.params)
  if not runs:
    return reader.restore(step, like)
  apart = sharding.place(mesh, jax.eval_shape(loops.unstack, like), shard=config.shard)
  places = jax.tree.map(lambda x: x.sharding, like)
  return jax.jit(lambda state: loops.stack(state, runs), out_shardings=places)(reader.restore(step, apart))


# ---- opening a run


@contextlib.contextmanager
def open_run(config: Config, workdir: str) -> Iterator[Run]:
  """Opens everything that `config` asks for, from the newest good checkpoint in `workdir` if there is one; closes it at the end.

  Raises UserError, with its kinds, for what a person can mend.
  """
  with contextlib.ExitStack() as opened:
    yield _opened_run(config, workdir, opened)


def _opened_run(config: Config, workdir: str, opened: contextlib.ExitStack) -> Run:
  config.validate()
  process, count = jax.process_index(), jax.process_count()
  watchdog = Watchdog(config.watchdog, workdir, process)
  opened.callback(watchdog.close)
  mesh = sharding.make_mesh()
  sharding.check_batch(config.batch, mesh, config.accumulate)
  data_config = resolve.data_config(config)
  data, test_data = _open_data(config, data_config, opened)
  steps_per_epoch = len(data) / config.batch
  total_steps = max(1, round(config.epochs * steps_per_epoch))
  lengths = {"batch": config.batch, "steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
  graph, params, stats = nnx.eval_shape(lambda: split_for_training(build_network(config.model, data.num_classes), config))
  optimizer = optim.make_optimizer(config.optim, params, **lengths)
  like = sharding.place(mesh, state_shapes(params, stats, optimizer, config), shard=config.shard)
  facts = _facts(config, data, shuffle_block(data_config, data), stats, mesh)

  # ---- what lies in the workdir
  log = Logbook(workdir, write=process == 0)
  if process == 0:
    opened.enter_context(workdir_lock(workdir, say=log.warn))
  opened.callback(log.close)
  keep = {"keep": config.keep_checkpoints, "keep_every": config.keep_every, "keep_best": config.keep_best}
  reader = CheckpointReader(workdir, say=log.warn)
  writer = CheckpointWriter(workdir, facts, **keep, say=log.warn)
  opened.push(lambda kind, error, traceback: writer.close(after_an_error=error is not None))
  last = reader.choose()
  meta = {} if last is None else reader.meta(last)
  rows = {"process": (process, count), "say": log.warn}
  batches = TrainBatches(data, data_config, batch=config.batch, seed=config.seed, **rows)
  opened.callback(batches.close)
  if last is not None:
    _check_continuation(meta, facts, batches, workdir, log.say)
  test_batches = EvalBatches(test_data, data_config, batch=sharding.whole_batch(config.eval_batch, mesh), **rows)
  opened.callback(test_batches.close)
  if last is None:
    network = initial_network(config, data.num_classes, log.warn)
    state = first_state(*split_for_training(network, config)[1:], optimizer, config, like)
  else:
    state = restored(reader, last, mesh, like, config)
    writer.go_on_from(last)

  run = Run(
    config=config,
    workdir=workdir,
    mesh=mesh,
    data=data,
    test_data=test_data,
    batches=batches,
    test_batches=test_batches,
    graph=graph,
    schedule=optim.make_schedule(config.optim, **lengths),
    like=like,
    train_step=train_step_over(config, mesh, graph, optimizer, like),
    eval_step=eval_step_over(config, mesh, graph),
    reader=reader,
    writer=writer,
    log=log,
    watchdog=watchdog,
    steps_per_epoch=steps_per_epoch,
    total_steps=total_steps,
    resumed_from=last,
    state=state,
    step=int(state.step),
    passed_over=int(state.passed_over),
    corrupt=set(meta.get("data", {}).get("corrupt", ())),
  )
  _announce(run, jax.eval_shape(loops.unstack, params))
  return run


def _open_data(config: Config, data_config: DataConfig, opened: contextlib.ExitStack) -> tuple[Source, Source]:
  """The training and the test images; ProcessError where the processes differ in configuration, data, code or JAX."""
  # Each line once: both splits of a folder may be taken from the same files.
  tell = functools.cache(lambda line: print(line, flush=True)) if jax.process_index() == 0 else lambda line: None
  data, test_data = (
    opened.enter_context(contextlib.closing(open_source(data_config, split, progress=tell)))
    for split in (data_config.train_split, data_config.test_split)
  )
  largest = len(data) * config.data.repeats
  if config.batch > largest:  # a step would have an image more often than that
    raise UserError(
      f"config.batch={config.batch} is more than the {len(data):,} images of {data.name} {data.split}; expected at most "
      f"{largest:,} (for configs/folder.py: bs=N behind the recipe)"
    )
  describe = lambda data: f"{data.name} {data.split}, {len(data):,} images, fingerprint {data.fingerprint()}"
  facts = {"config": json.dumps(to_json(config)), "data": describe(data), "test data": describe(test_data)}
  distributed.require_equal(facts, tell)
  return data, test_data


def _facts(config: Config, data: Source, shuffle_block: int, stats: nnx.State, mesh: Mesh) -> RunFacts:
  return RunFacts(
    config=config,
    class_names=data.class_names,
    fingerprint=data.fingerprint(),
    records=len(data),
    shuffle_block=shuffle_block,
    rows_normalized=rows_normalized(config, stats, mesh.size),
    rows_ascended=rows_ascended(config, mesh.size),
  )


def _check_continuation(
  meta: dict[str, Any], facts: RunFacts, batches: TrainBatches, workdir: str, say: Callable[[str], None]
) -> None:
  """Raises CheckpointError where this run is not the one that wrote the checkpoint; says so where it is only prolonged."""
  check_same_run(meta["config"], facts.config, workdir)
  check_same_data(meta, facts, workdir)
  check_same_order(meta, batches.order_digest(meta["data"]["next_step"]), workdir)
  before, now = meta["config"].get("epochs", facts.config.epochs), facts.config.epochs
  if before != now:
    say(f"config.epochs was {before:g}, is {now:g}: the learning rate follows the schedule of the new length")


def _write_config(run: Run) -> None:
  try:
    write_file(os.path.join(run.workdir, "config.json"), (json.dumps(to_json(run.config), indent=2) + "\n").encode())
  except OSError as error:  # as with all that only people read: the checkpoints hold the configuration too
    run.log.say(f"{run.workdir}/config.json cannot be written: {error.strerror}; training goes on")


def _announce(run: Run, params: nnx.State) -> None:
  """Begins the log, and says what is going to happen."""
  config, log, count = run.config, run.log, jax.process_count()
  smoothing = f", labels smoothed {config.label_smoothing:g}" if config.label_smoothing else ""
  log.begin(run.step, run.total_steps, f"train{smoothing}")
  if jax.process_index() == 0:
    _write_config(run)
  log.say(text.changes(config))
  log.say(optim.describe_groups(params, config.optim))
  log.say(
    f"{config.model.name}, {sum(p.size for p in jax.tree.leaves(params)):,} parameters; {len(run.data):,} training and "
    f"{len(run.test_data):,} test images, {run.batches.size} and {run.test_batches.size} pixels a side, "
    f"{run.data.num_classes} classes; {run.total_steps:,} steps of {config.batch} images; {run.mesh.size} × "
    f"{jax.devices()[0].device_kind} ({count} process{'es' * (count > 1)}), jax {jax.__version__}, {platform.node()}"
  )
  if run.resumed_from is not None:
    at_the_end = ", which is the end of the training" if run.step >= run.total_steps else ""
    log.say(f"resumed from {run.reader.path(run.resumed_from)}{at_the_end}")
