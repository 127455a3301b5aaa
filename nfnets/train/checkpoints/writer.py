"""Writes checkpoints: by Orbax in the background, sealed with a manifest; deletes those that are kept no longer."""

import concurrent.futures
import logging
import os
import pathlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from nfnets import distributed
from nfnets.train.checkpoints import arrays, compatibility, manifest, retention
from nfnets.train.checkpoints.compatibility import RunFacts
from nfnets.train.checkpoints.errors import CheckpointError, SaveError
from nfnets.train.step.state import TrainState, unstacked

_WRITE_SECONDS = 600  # until a process gives up waiting for the others' part of a write

Results = Mapping[str, Mapping[str, float]]  # an evaluation: {"params": {"top1", "loss", …}, "ema": …}


class CheckpointWriter:
  """Saves the states of one run in `workdir/checkpoints/STEP`; `close` waits for the last write.

  With several processes, every method must be called by all of them, in one order; process 0 writes manifests and deletes.
  """

  def __init__(
    self,
    workdir: str,
    facts: RunFacts,
    *,
    keep: int,
    keep_every: float = 0.0,
    keep_best: str = "",
    say: Callable[[str], None] = print,
  ):
    """Removes what a killed run left half written.

    Args:
      workdir: where the run lives, a directory that all processes see.
      facts: what the run's images and arithmetic follow from; stands in every checkpoint.
      keep: how many of the newest steps stay.
      keep_every, keep_best: see `Config`.
      say: gets a line about whatever goes wrong in the background.
    """
    self.directory, _ = retention.locate(workdir)
    self._facts, self._say = facts, say
    self._keep = {"newest": keep, "every": keep_every, "best": keep_best}
    self._newest: int | None = None  # the step that the run went on from, or that was last handed to `save`
    self._failed: SaveError | None = None
    self._written: concurrent.futures.Future[None] | None = None  # of the last save: manifest, deletions and all
    self._orbax_is_free = threading.Event()  # it writes one checkpoint at a time
    self._orbax_is_free.set()
    self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    self.directory.mkdir(parents=True, exist_ok=True)
    logging.getLogger("absl").addFilter(_is_no_error_of_orbax)
    distributed.require_shared_storage(self.directory)
    if jax.process_index() == 0:
      self._remove_leftovers()

  def path(self, step: int) -> pathlib.Path:
    return self.directory / str(step)

  def go_on_from(self, step: int) -> None:
    """The run continues from `step`, which was restored: newer steps are set aside as STEP.aside.

    Raises CheckpointError where they cannot be: a later start would go on from one of them.
    """
    self._newest = step
    if jax.process_index() != 0:
      return
    try:
      for newer in (self.path(saved) for saved in retention.steps(self.directory) if saved > step):
        self._say(f"going on from step {step}: {newer} is set aside as {retention.set_aside(newer).name}")
    except OSError as error:
      raise CheckpointError(f"{self.directory}: steps after {step} cannot be set aside: {error.strerror}") from error

  def save(
    self, state: TrainState, *, results: Results | None = None, order_digest: str = "", corrupt: tuple[int, ...] = ()
  ) -> None:
    """Copies the state to the host, then writes in the background; what goes wrong there is said, and raised by `wait`.

    A step that is saved already is left alone.

    Args:
      state: the state after `state.step` updates.
      results: the evaluation of this very state, if there was one; with it the step can be kept as the best.
      order_digest: of the order of the images to come (`TrainBatches.order_digest`).
      corrupt: the numbers of the records that all processes have found corrupt so far.
    """
    step = int(state.step)
    already_saved = self._has_saved(step)
    if jax.process_index() == 0 and not already_saved and self.path(step).is_dir():
      self._delete(self.path(step))  # there only if a run left it that this one did not go on from
    if distributed.broadcast_from_first(already_saved):
      return
    config = self._facts.config
    trees = arrays.split(unstacked(state))
    summary = {
      "step": step,
      "epoch": step * config.batch / self._facts.records,
      "keep": self._keep,
      "versions": compatibility.versions(),
    }
    meta = {
      "schema": manifest.SCHEMA,
      **summary,
      "previous_step": self._previous_step(),
      "num_classes": len(self._facts.class_names),
      "config": compatibility.to_json(config),
      "shapes": {item: arrays.shapes(tree) for item, tree in trees.items()},
      "data": {
        **self._facts.data(),
        "next_step": step + int(state.passed_over),
        "order_digest": order_digest,
        "corrupt": list(corrupt),
      },
      "rng": compatibility.random_numbers(config),
      "processes": jax.process_count(),
      "devices": jax.device_count(),
      "commit": compatibility.commit(),
    }
    self._orbax_is_free.wait()  # hashing the checkpoint before this one may still go on
    # A new one each time, since an error stays in the old one.
    handler = ocp.CompositeCheckpointHandler(handler_registry=_handlers())
    checkpointer = ocp.AsyncCheckpointer(handler, timeout_secs=_WRITE_SECONDS)
    items = {item: ocp.args.PyTreeSave(named) for item, tree in trees.items() if (named := arrays.by_name(tree))}
    error = None
    try:
      checkpointer.save(self.path(step), args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items))
    except Exception as reason:  # also errors that are no OSError: training goes on whatever the disk does
      error = reason
    self._newest, self._orbax_is_free = step, threading.Event()
    body = {**summary, "metrics": _flat(results)}
    self._written = self._pool.submit(self._finish, checkpointer, body, error, self._orbax_is_free)

  def add_metrics(self, step: int, results: Results) -> None:
    """Notes the evaluation of a step that was saved without one; to be called after all processes have evaluated it."""
    if jax.process_index() == 0:
      try:
        manifest.amend(self.path(step), metrics=_flat(results))
      except OSError as error:
        self._say(f"{self.path(step)}: its metrics could not be noted: {error.strerror}")

  def settle(self) -> None:
    """Waits until nothing is being written any more."""
    if self._written is not None:
      self._written.result()

  def wait(self) -> None:
    """As `settle`. Raises SaveError, once, if the last write failed."""
    self.settle()
    failed, self._failed = self._failed, None
    if failed is not None:
      raise failed

  def close(self, *, after_an_error: bool = False) -> None:
    """As `wait`; nothing can be saved after it. After an error a failed write is not raised as well: it has been said."""
    self._pool.shutdown()
    self.settle() if after_an_error else self.wait()

  def _finish(
    self, checkpointer: ocp.AsyncCheckpointer, body: dict[str, Any], error: Exception | None, orbax_is_free: threading.Event
  ) -> None:
    """In the background: waits for Orbax, writes the manifest, deletes the checkpoints that are kept no longer."""
    step, first = body["step"], jax.process_index() == 0
    try:
      try:
        checkpointer.close()
      finally:
        orbax_is_free.set()
      if error is not None:
        raise error
      if first:
        manifest.write(self.path(step), body)
    except Exception as reason:
      self._failed = SaveError(f"checkpoint of step {step} could not be written to {self.directory}: {_system_words(reason)}")
      self._failed.__cause__ = reason
      self._say(f"{self._failed}; the checkpoints before it are untouched, training goes on")
      if first:
        self._remove_failed(step)
      return
    self._failed = None
    if first:
      self._delete_old_steps()

  def _has_saved(self, step: int) -> bool:
    """Whether this run has saved the step, or went on from it."""
    if step != self._newest:
      return False
    self.settle()
    return self._failed is None and manifest.readable(self.path(step)) is not None

  def _previous_step(self) -> int | None:
    """The newest finished step; None if there is none yet."""
    try:
      return max(retention.finished_steps(self.directory), default=None)
    except OSError:  # the save that follows tells whether the disk is still there
      return self._newest

  def _delete_old_steps(self) -> None:
    """Deletes the checkpoints that are kept no longer."""
    try:
      manifests = [body for step in retention.steps(self.directory) if (body := manifest.readable(self.path(step)))]
    except OSError as error:
      self._say(f"{self.directory} cannot be listed: {error.strerror}; no checkpoint is deleted")
      return
    kept = retention.kept(manifests, **self._keep)
    self._delete(*(self.path(body["step"]) for body in manifests if body["step"] not in kept))

  def _remove_failed(self, step: int) -> None:
    """Deletes what a failed write left; those parts of it that did not fail may still be writing for a moment."""
    quiet_rounds = 0
    for _ in range(50):
      candidates = (*self.directory.glob(f"{step}.orbax-checkpoint-tmp*"), self.path(step))
      directories = [path for path in candidates if path.is_dir()]
      quiet_rounds = 0 if directories else quiet_rounds + 1
      if quiet_rounds == 3:
        break
      for path in directories:
        shutil.rmtree(path, ignore_errors=True)
      time.sleep(0.1)

  def _remove_leftovers(self) -> None:
    leftovers = retention.litter(self.directory)
    if leftovers:
      names = ", ".join(path.name for path in leftovers)
      self._say(f"removed what a run that was killed left in {self.directory}: {names}")
      self._delete(*leftovers)

  def _delete(self, *paths: pathlib.Path) -> None:
    for path in paths:
      try:
        if path.is_dir():
          retention.remove(path)
      except OSError as error:
        self._say(f"{path} could not be deleted: {error.strerror}")


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
  """Lets one device write an array that several hold.

  Else Orbax has each of them write a part, and compiles a program for each part of each shape, for which the first save waits
  (docs/speed.md).
  """
  types = ocp.type_handlers.create_type_handler_registry((jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False)))
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  registry.add(None, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(type_handler_registry=types))
  return registry


def _flat(results: Results | None) -> dict[str, float] | None:
  """{"top1": …, "ema_top1": …} of an evaluation."""
  flat = {
    ("ema_" if weights == "ema" else "") + name: float(value)
    for weights, values in (results or {}).items()
    for name, value in values.items()
  }
  return flat or None


def _system_words(error: BaseException) -> str:
  """The system's words for what happened, if the error holds them; Orbax's own messages are pages long."""
  code = re.search(r"os_error_code='(\d+)'", str(error))
  if code:
    return os.strerror(int(code[1]))
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def _is_no_error_of_orbax(record: logging.LogRecord) -> bool:
  """A log filter: an error of a write reaches us as an exception and is said in one line; Orbax logs it with three tracebacks."""
  return record.levelno < logging.ERROR or "/orbax/" not in record.pathname
