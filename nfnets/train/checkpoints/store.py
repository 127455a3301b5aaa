"""Checkpoints: written by Orbax in the background, sealed with a manifest, verified before they are restored."""

import concurrent.futures
import json
import logging
import os
import pathlib
import re
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from nfnets import distributed
from nfnets.config import Config
from nfnets.train.checkpoints import arrays, compatibility, manifest, retention
from nfnets.train.checkpoints.errors import CheckpointError, SaveError
from nfnets.train.step.state import TrainState

_WRITE_SECONDS = 600  # until a process gives up waiting for the others' part of a write


class Checkpoints:
  """The checkpoints of a workdir, in `workdir/checkpoints/STEP`; close() waits for the last write.

  Each holds "model" (parameters and running statistics), "ema", "training" (all other fields of the state but `halted`), "meta"
  (configuration, versions, data state, ...) and a manifest, without which it is none. Arrays are named by their paths, so that no
  class has to be the same on reading. Without `keep` it only reads. With several processes `choose`, `save`, `restore` and
  `restore_model` must be called by all, in one order; the workdir must be on storage that all of them see.
  """

  def __init__(
    self,
    workdir: str,
    *,
    keep: int | None = None,
    keep_every: float = 0.0,
    keep_best: str = "",
    say: Callable[[str], None] = print,
  ):
    """keep: the newest so many stay; keep_every, keep_best: see Config. `say` gets a line about whatever goes wrong."""
    self.directory, _ = retention.locate(workdir)
    self.say = say
    self._writes = keep is not None
    self._keep = {"newest": keep, "every": keep_every, "best": keep_best}
    self._verified: set[int] = set()
    self._newest: int | None = None  # the step that was last restored, or handed to save
    self._failed: SaveError | None = None
    self._committed, self._finished = threading.Event(), None
    self._committed.set()
    self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    if self._writes:
      self.directory.mkdir(parents=True, exist_ok=True)
      logging.getLogger("absl").addFilter(_not_from_orbax)
      distributed.require_shared_storage(self.directory)
      if jax.process_index() == 0:
        self._tidy()

  # ---- looking

  def steps(self) -> list[int]:
    """The steps that have a manifest, ascending; nothing is hashed."""
    return [step for step in retention.steps(self.directory) if self._manifest(step)]

  def latest(self) -> int | None:
    """The newest of `steps`, after a write that is under way, or None."""
    self._settle()
    return max(self.steps(), default=None)

  def path(self, step: int) -> pathlib.Path:
    return self.directory / str(step)

  def verify(self, step: int) -> list[str]:
    """What is wrong with a step, a line each, every file hashed; nothing if it is good."""
    return manifest.verify(self.path(step))

  def meta(self, step: int) -> dict[str, Any]:
    """What is known of a step beside its arrays: "config", "num_classes", "versions", "data", "rng", ..."""
    try:
      return json.loads((self.path(step) / "meta" / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
      raise CheckpointError(f"{self.path(step)}: its meta data cannot be read: {error}") from error

  def metrics(self, step: int) -> dict[str, float] | None:
    """{"top1", "loss", "ema_top1", …} of the evaluation of a good step; None if it has not been evaluated."""
    return manifest.read(self.path(step))["metrics"]

  def evaluated(self, step: int) -> bool:
    """Whether a good step has metrics; all processes get the same answer."""
    return bool(distributed.broadcast_from_first(jax.process_index() == 0 and self.metrics(step) is not None))

  def add_metrics(self, step: int, results: dict[str, dict[str, float]]) -> None:
    """For a step that was saved without them, by all processes after all have evaluated it."""
    if jax.process_index() == 0:
      try:
        manifest.amend(self.path(step), metrics=_flat(results))
      except OSError as error:
        self.say(f"{self.path(step)}: its metrics could not be noted: {error.strerror}")

  def choose(self, step: int | None = None) -> int | None:
    """The newest good step (or `step`, which must be good), all files verified; None if there is no checkpoint at all.

    All processes get the same one. Raises CheckpointError if there are checkpoints but none is good.
    """
    self._settle()
    found, error = -1, None
    if jax.process_index() == 0:
      try:
        found = self._choose(step)
      except CheckpointError as reason:
        found, error = -2, reason
    found = distributed.broadcast_from_first(found)
    if found == -2:
      raise error or CheckpointError(f"{self.directory}: no good checkpoint; process 0 says why")
    if found >= 0:
      self._verified.add(found)
      distributed.require_seen(self.path(found))
    return found if found >= 0 else None

  def _choose(self, step: int | None) -> int:
    problems, candidates = {}, [step] if step is not None else retention.steps(self.directory)[::-1]
    for each in candidates:
      wrong = self.verify(each)
      if not wrong:
        for bad, reasons in problems.items():
          self.say(f"checkpoint {self.path(bad)} is not good: {_some(reasons)}; taking {self.path(each)} instead")
        return each
      problems[each] = wrong
    if not candidates:
      return -1
    lines = "; ".join(f"{self.path(bad)}: {_some(reasons)}" for bad, reasons in problems.items())
    raise CheckpointError(f"no good checkpoint: {lines}")

  # ---- writing

  def save(
    self,
    state: TrainState,
    config: Config,
    *,
    num_classes: int,
    records: int,
    results: dict[str, dict[str, float]] | None = None,
    shuffle_block: int = 1,
    rows: int | None = None,
  ) -> None:
    """Copies the state to the host, then writes in the background; what goes wrong there is said, and raised by wait().

    A step that is saved already is left alone. records: length of the training set. results: this very state's evaluation,
    {"params": {"top1", "loss", …}, "ema": …}; with it the step can be kept as the best. Others: see `check_same_data`.
    """
    if not self._writes:
      raise ValueError("Checkpoints(workdir) only reads; give keep=N to write")
    step = int(state.step)
    if distributed.broadcast_from_first(self._has(step)):
      return
    epoch = step * config.batch / records
    trees = arrays.split(state)
    known = {"step": step, "epoch": epoch, "keep": self._keep, "versions": compatibility.versions()}
    facts = {**known, "metrics": _flat(results)}
    meta = {
      "schema": manifest.SCHEMA,
      **known,
      "previous_step": max(self.steps(), default=None),
      "num_classes": num_classes,
      "config": compatibility.to_json(config),
      "shapes": {item: arrays.shapes(tree) for item, tree in trees.items()},
      "data": {
        "seed": config.seed,
        "records": records,
        "next_step": step + int(state.passed_over),
        "shuffle_block": shuffle_block,
        "rows": rows,
      },
      "rng": compatibility.random_numbers(config),
      "processes": jax.process_count(),
      "devices": jax.device_count(),
      "commit": compatibility.commit(),
    }
    self._committed.wait()  # Orbax writes one at a time; hashing the one before may still go on
    # A new one each time: an error stays in the old one.
    writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), timeout_secs=_WRITE_SECONDS)
    items = {item: ocp.args.StandardSave(found) for item, tree in trees.items() if (found := arrays.by_name(tree))}
    error = None
    try:
      writer.save(self.path(step), args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items))
    except Exception as reason:  # also what is no OSError: training must go on whatever the disk does
      error = reason
    self._newest, self._committed = step, threading.Event()
    self._finished = self._pool.submit(self._finish, writer, facts, error, self._committed)

  def _finish(
    self, writer: ocp.AsyncCheckpointer, facts: dict[str, Any], error: Exception | None, committed: threading.Event
  ) -> None:
    """In the background: waits for Orbax, writes the manifest, deletes what is kept no longer."""
    step, first = facts["step"], jax.process_index() == 0
    try:
      try:
        writer.close()
      finally:
        committed.set()
      if error is not None:
        raise error
      if first:
        manifest.write(self.path(step), facts)
    except Exception as reason:
      self._failed = SaveError(f"checkpoint of step {step} could not be written to {self.directory}: {_reason(reason)}")
      self._failed.__cause__ = reason
      self.say(f"{self._failed}; the checkpoints before it are untouched, training goes on")
      if first:
        self._sweep(step)
      return
    self._failed = None
    if first:
      found = [one for one in map(self._manifest, retention.steps(self.directory)) if one]
      kept = retention.kept(found, **self._keep)
      self._delete(*(self.path(one["step"]) for one in found if one["step"] not in kept))

  def wait(self) -> None:
    """Until the last write has ended, manifest and all. Raises SaveError, once, if it failed."""
    self._settle()
    failed, self._failed = self._failed, None
    if failed is not None:
      raise failed

  def close(self) -> None:
    """As wait; nothing can be saved after it."""
    self._pool.shutdown()
    self.wait()

  def _settle(self) -> None:
    if self._finished is not None:
      self._finished.result()

  def _has(self, step: int) -> bool:
    if step == self._newest:
      self._settle()
      return self._failed is None and self._manifest(step) is not None
    if jax.process_index() == 0 and self.path(step).is_dir():
      self._delete(self.path(step))  # of steps that this run did not go on from
    return False

  def _manifest(self, step: int) -> dict[str, Any] | None:
    try:
      return manifest.read(self.path(step))
    except CheckpointError:
      return None

  def _sweep(self, step: int) -> None:
    """Deletes what a failed write left; the parts of it that did not fail may still be writing."""
    quiet = 0
    for _ in range(50):
      paths = [path for path in (*self.directory.glob(f"{step}.orbax-checkpoint-tmp*"), self.path(step)) if path.is_dir()]
      quiet = 0 if paths else quiet + 1
      if quiet == 3:
        break
      for path in paths:
        shutil.rmtree(path, ignore_errors=True)
      time.sleep(0.1)

  def _tidy(self) -> None:
    left = retention.litter(self.directory)
    if left:
      self.say(f"removed what a run that was killed left in {self.directory}: {', '.join(path.name for path in left)}")
      self._delete(*left)

  def _delete(self, *paths: pathlib.Path) -> None:
    for path in paths:
      try:
        if path.exists():
          retention.remove(path)
      except OSError as error:
        self.say(f"{path} could not be deleted: {error.strerror}")

  # ---- restoring

  def restore(self, step: int, like: TrainState) -> TrainState:
    """The state saved at `step`, in the structure and with the shardings of the (abstract) state `like`; not halted.

    Whoever writes goes on from there: newer steps are set aside, as STEP.aside. Raises CheckpointError naming what is damaged, or
    differs in shape or dtype, or is missing.
    """
    found = self._restore(step, arrays.split(like))
    if self._writes:
      self._newest = step
      if jax.process_index() == 0:
        for newer in (self.path(each) for each in retention.steps(self.directory) if each > step):
          self.say(f"going on from step {step}: {newer} is set aside as {retention.set_aside(newer).name}")
    return arrays.join(found, like)

  def restore_model(self, step: int, params: nnx.State, stats: nnx.State) -> dict[str, Any]:
    """{"params": (params, stats), "ema": the same, averaged, if it was kept}, for evaluation: no optimizer is read."""
    self._check_good(step)
    names = {"params": "model", **({"ema": "ema"} if self.meta(step)["shapes"]["ema"] else {})}
    found = self._restore(step, dict.fromkeys(names.values(), {"params": params, "stats": stats}))
    return {weights: (found[item]["params"], found[item]["stats"]) for weights, item in names.items()}

  def restore_weights(self, step: int, which: str = "params") -> dict[str, np.ndarray]:
    """The network's arrays on the host by their paths, running statistics included. which: "params" or "ema"."""
    item = {"params": "model", "ema": "ema"}[which]
    self._check_good(step)
    shapes = self.meta(step)["shapes"][item]
    if not shapes:
      raise CheckpointError(f"{self.path(step)} holds no average (EMA) of the weights")
    wanted = {arrays.name(path): np.empty(shape, jnp.dtype(dtype)) for path, (dtype, shape) in shapes.items()}
    found = self._read(step, {item: wanted})[item]
    # without the "params/" and "stats/" that paths begin with
    return {path.partition("/")[2]: np.ascontiguousarray(found[arrays.name(path)]) for path in shapes}

  def _restore(self, step: int, trees: dict[str, Any]) -> dict[str, Any]:
    self._check_good(step)
    saved = self.meta(step)["shapes"]
    for item, tree in trees.items():
      odd = arrays.differences(saved[item], arrays.shapes(tree))
      if odd:
        what = "network" if item == "model" else f"{item} state"
        raise CheckpointError(f"{self.path(step)} holds another {what}: {len(odd)} arrays differ: {', '.join(odd[:3])}")
    wanted = {item: jax.tree.map(arrays.abstract, arrays.by_name(tree)) for item, tree in trees.items()}
    found = self._read(step, wanted)
    return {item: arrays.fill(tree, found[item]) for item, tree in trees.items()}

  def _read(self, step: int, wanted: dict[str, dict[str, Any]]) -> dict[str, Any]:
    items = {item: ocp.args.StandardRestore(like) for item, like in wanted.items() if like}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
      found = reader.restore(self.path(step), args=ocp.args.Composite(**items))
    return {item: found[item] if item in items else {} for item in wanted}

  def _check_good(self, step: int) -> None:
    if step not in self._verified:
      self.choose(step)


def _flat(results: dict[str, dict[str, float]] | None) -> dict[str, float] | None:
  return {
    ("ema_" if weights == "ema" else "") + name: float(value)
    for weights, values in (results or {}).items()
    for name, value in values.items()
  } or None


def _some(problems: list[str]) -> str:
  return problems[0] + (f", and {len(problems) - 1} more" if len(problems) > 1 else "")


def _reason(error: BaseException) -> str:
  """The system's word for what happened, if it is in there; Orbax's own messages are pages long."""
  code = re.search(r"os_error_code='(\d+)'", str(error))
  if code or isinstance(error, OSError) and error.strerror:
    return os.strerror(int(code[1])) if code else error.strerror
  return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def _not_from_orbax(record: logging.LogRecord) -> bool:
  # An error of a write reaches us as an exception and is said in one line; Orbax logs it, too, with three tracebacks.
  return record.levelno < logging.ERROR or "/orbax/" not in record.pathname
