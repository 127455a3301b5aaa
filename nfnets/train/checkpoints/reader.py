"""Reads checkpoints: the newest good one is found, every file verified, and its arrays are restored. Writes nothing."""

import math
import operator
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from nfnets import distributed
from nfnets.train.checkpoints import arrays, manifest, retention, schema
from nfnets.train.checkpoints.errors import CheckpointError
from nfnets.train.step.state import TrainState

# What a network's arrays may take, bytes: a small one's, and so many times the bytes of its files. Random numbers are hardly
# compressed; gains and biases of a new network, which are zeros, take no place.
_LEAST_BYTES = 64 << 20
_MOST_COMPRESSED = 100


class CheckpointReader:
  """The checkpoints of a workdir, in `workdir/checkpoints/STEP`.

  Each holds "model" (parameters and running statistics), "ema", "training" (all other fields of the state but `halted`), "meta"
  (configuration, versions, state of the data …) and a manifest, without which it is no checkpoint. Arrays are named by their
  paths, so no class has to be the same on reading. With several processes, `choose`, `restore`, `restore_model` and `evaluated`
  must be called by all of them, in one order; the workdir must be on storage that all of them see.
  """

  def __init__(self, workdir: str, *, say: Callable[[str], None] = print):
    """workdir: also its `checkpoints`, or one step in there. say: gets a line about each checkpoint that is not good."""
    self.directory, _ = retention.locate(workdir)
    self._say = say
    self._verified: set[int] = set()

  def path(self, step: int) -> pathlib.Path:
    return self.directory / str(step)

  def steps(self) -> list[int]:
    """The steps that have a manifest, ascending; no file is hashed."""
    return retention.finished_steps(self.directory)

  def verify(self, step: int) -> list[str]:
    """What is wrong with a step, a line each, every file hashed; empty if it is good."""
    return manifest.verify(self.path(step))

  def meta(self, step: int) -> dict[str, Any]:
    """What a step says of itself beside its arrays: "config", "num_classes", "versions", "data", "rng" …"""
    try:
      return manifest.read_meta(self.path(step))
    except CheckpointError as error:
      raise CheckpointError(f"{self.path(step)}: {error}") from error

  def metrics(self, step: int) -> dict[str, float] | None:
    """{"top1", "loss", "ema_top1", …} of the evaluation of a good step; None if it has not been evaluated."""
    return manifest.read(self.path(step))["metrics"]

  def evaluated(self, step: int) -> bool:
    """Whether a good step has metrics; all processes get the same answer."""
    return bool(distributed.broadcast_from_first(jax.process_index() == 0 and self.metrics(step) is not None))

  def choose(self, step: int | None = None) -> int | None:
    """The newest good step, or `step`, which must be good; all its files are verified. None if there is no checkpoint at all.

    All processes get the same answer.

    Raises:
      CheckpointError: there are checkpoints, but none is good.
    """
    none, failed = -1, -2
    chosen, error = none, None
    if jax.process_index() == 0:
      try:
        newest = self._newest_good(step)
        chosen = none if newest is None else newest
      except CheckpointError as reason:
        chosen, error = failed, reason
    chosen = distributed.broadcast_from_first(chosen)
    if chosen == failed:
      raise error or CheckpointError(f"{self.directory}: no good checkpoint; process 0 says why")
    if chosen == none:
      return None
    self._verified.add(chosen)
    distributed.require_seen(self.path(chosen))
    return chosen

  def _newest_good(self, step: int | None) -> int | None:
    candidates = retention.steps(self.directory)[::-1] if step is None else [step]
    problems: dict[int, list[str]] = {}
    for candidate in candidates:
      lines = self.verify(candidate)
      if not lines:
        for bad, reasons in problems.items():
          self._say(f"checkpoint {self.path(bad)} is not good: {_shortened(reasons)}; taking {self.path(candidate)} instead")
        return candidate
      problems[candidate] = lines
    if not candidates:
      return None
    listing = "; ".join(f"{self.path(bad)}: {_shortened(reasons)}" for bad, reasons in problems.items())
    raise CheckpointError(f"no good checkpoint: {listing}")

  def restore(self, step: int, like: TrainState) -> TrainState:
    """The state saved at `step`, in the structure and with the shardings of the (abstract) state `like`; not halted.

    Raises:
      CheckpointError: a file is damaged, or an array is missing or has another shape or dtype; the message names it.
    """
    return arrays.join(self._restore(step, arrays.split(like)), like)

  def restore_model(self, step: int, params: nnx.State, stats: nnx.State) -> dict[str, tuple[nnx.State, nnx.State]]:
    """{"params": (params, stats), "ema": their averages, if they were kept}, for evaluation; no optimizer's state is read."""
    self._require_good(step)
    items = {"params": "model", **({"ema": "ema"} if self.meta(step)["shapes"]["ema"] else {})}
    trees = self._restore(step, dict.fromkeys(items.values(), {"params": params, "stats": stats}))
    return {weights: (trees[item]["params"], trees[item]["stats"]) for weights, item in items.items()}

  def restore_weights(self, step: int, which: str = "params") -> dict[str, np.ndarray]:
    """The network's arrays on the host by their paths, running statistics included. which: "params" or "ema"."""
    item = {"params": "model", "ema": "ema"}[which]
    self._require_good(step)
    shapes = self.meta(step)["shapes"][item]
    if not shapes:
      raise CheckpointError(f"{self.path(step)} holds no average (EMA) of the weights")
    # arrays of one element, repeated: nothing is allocated before the files have been looked at
    wanted = {
      arrays.name(path): np.broadcast_to(np.zeros((), jnp.dtype(dtype)), shape) for path, (dtype, shape) in shapes.items()
    }
    restored = self._read(step, {item: wanted})[item]
    # without the "params/" and "stats/" that paths begin with
    return {path.partition("/")[2]: np.array(restored[arrays.name(path)]) for path in shapes}

  def _restore(self, step: int, trees: dict[str, Any]) -> dict[str, Any]:
    self._require_good(step)
    saved = self.meta(step)["shapes"]
    for item, tree in trees.items():
      differences = arrays.differences(saved[item], arrays.shapes(tree))
      if differences:
        what = "network" if item == "model" else f"{item} state"
        raise CheckpointError(
          f"{self.path(step)} holds another {what}: {len(differences)} arrays differ: {', '.join(differences[:3])}"
        )
    wanted = {item: jax.tree.map(arrays.abstract, arrays.by_name(tree)) for item, tree in trees.items()}
    restored = self._read(step, wanted)
    return {item: arrays.fill(tree, restored[item]) for item, tree in trees.items()}

  def _read(self, step: int, wanted: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Reads arrays, once it is known that they are as large as `wanted` says; an error is the (verified) files' own."""
    items = {item: ocp.args.StandardRestore(like) for item, like in wanted.items() if like}
    try:
      for item in items:
        self._check_recorded(step, item, wanted[item])
      with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(self.path(step), args=ocp.args.Composite(**items))
    except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:
      line = (str(error).splitlines() or [""])[0][:300]
      raise CheckpointError(f"{self.path(step)}: its arrays cannot be read: {type(error).__name__}: {line}") from error
    return {item: restored[item] if item in items else {} for item in wanted}

  def _check_recorded(self, step: int, item: str, wanted: dict[str, Any]) -> None:
    """Compares the arrays' shapes with those that the files of an item record, and with the files' sizes, before memory is taken.

    Zeros take no place in the files, so that an optimizer's state can be any times larger than these; it is only read into the
    state of a run, whose own configuration says how large that is. A network is not all zeros.
    """
    directory = self.path(step) / item
    on_disk = 0
    for path in directory.rglob("*"):
      size = path.stat().st_size if path.is_file() else 0
      if size > schema.JSON_BYTES and path.parent.name != "d":  # Orbax keeps arrays in directories of this name, JSON elsewhere
        raise CheckpointError(f"{path} has {size:,} bytes, expected at most {schema.JSON_BYTES:,}")
      on_disk += size
    claimed = sum(math.prod(like.shape) * like.dtype.itemsize for like in wanted.values())
    if item != "training" and claimed > _LEAST_BYTES + _MOST_COMPRESSED * on_disk:
      raise CheckpointError(
        f"{directory}: claims {claimed:,} bytes of arrays, but its files have {on_disk:,}; expected at most {_MOST_COMPRESSED} "
        "times as many"
      )
    recorded = ocp.StandardCheckpointHandler().metadata(directory).tree  # pyrefly: ignore[bad-argument-type]: it takes any path
    for name, like in wanted.items():
      found = recorded[name]
      chunk = found.storage.chunk_shape or found.shape
      if found.shape != tuple(like.shape) or found.dtype != like.dtype or any(map(operator.gt, chunk, like.shape)):
        raise CheckpointError(
          f"{directory}: {schema.shown(name)} is recorded as {found.dtype} {found.shape} in parts of {tuple(chunk)}, expected "
          f"{like.dtype} {tuple(like.shape)}"
        )

  def _require_good(self, step: int) -> None:
    if step not in self._verified:
      self.choose(step)


def _shortened(problems: list[str]) -> str:
  return problems[0] + (f", and {len(problems) - 1} more" if len(problems) > 1 else "")
