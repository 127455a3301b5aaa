"""Checkpoints: written by Orbax in the background, kept by count, restored against what they should hold."""
import dataclasses
import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Sharding

import nfnets
from nfnets.agc import named_leaves
from nfnets.config import Config
from nfnets.train.state import TrainState

# Fields that may change between a run and its continuation: they alter neither the parameters nor the images.
MAY_DIFFER = ("data.dir", "data.index_dir", "data.threads", "data.max_corrupt", "data.test_split", "data.test_crop",
              "data.test_image_size", "eval_batch", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints")


class CheckpointError(ValueError):
  """There is no checkpoint, or it is not one of this configuration's; the message says what differs."""


class Checkpoints:
  """The checkpoints of a workdir, in `workdir/checkpoints/STEP`; close() waits for the last write.

  Each holds "model" (parameters and running statistics), "ema", "training" (optimizer, step) and "meta" (configuration, step,
  versions). Arrays are named by their paths, so that no class has to be the same on reading.
  """

  def __init__(self, workdir: str, *, keep: int | None = None):
    self.directory = pathlib.Path(workdir).resolve() / "checkpoints"
    # Reading makes no directory: a mistyped path is an error, not an empty folder.
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None, enable_async_checkpointing=keep is not None)
    self._manager = ocp.CheckpointManager(self.directory, options=options) if keep or self.directory.is_dir() else None

  def latest(self) -> int | None:
    """The newest step, or None."""
    return self._manager.latest_step() if self._manager else None

  def path(self, step: int) -> pathlib.Path:
    return self.directory / str(step)

  def save(self, state: TrainState, config: Config, *, num_classes: int) -> None:
    """Copies the state to the host, then writes in the background. A step that is there already is left alone."""
    step = int(state.step)
    if step == self.latest():
      return
    items = {"model": _named((state.params, state.stats)), "ema": _named(state.ema),
             "training": _named((state.opt_state, state.step))}
    meta = {"step": step, "num_classes": num_classes, "config": to_json(config),
            "shapes": jax.tree.map(lambda x: list(x.shape), items),
            "versions": {"nfnets": nfnets.__version__, "jax": jax.__version__}}
    self._manager.save(step, args=ocp.args.Composite(
        meta=ocp.args.JsonSave(meta), **{name: ocp.args.StandardSave(arrays) for name, arrays in items.items()}))

  def meta(self, step: int) -> dict[str, Any]:
    return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

  def restore(self, step: int, like: TrainState, sharding: Sharding) -> TrainState:
    """The state saved at `step`, in the structure of the (abstract) state `like`, placed by `sharding`.

    Raises CheckpointError naming what differs in shape or is missing.
    """
    trees = {"model": (like.params, like.stats), "ema": like.ema, "training": (like.opt_state, like.step)}
    (params, stats), ema, (opt_state, step_array) = self._restore(step, trees, sharding).values()
    return dataclasses.replace(like, params=params, stats=stats, ema=ema, opt_state=opt_state, step=step_array,
                               halted=jax.device_put(False, sharding))

  def restore_model(self, step: int, params: nnx.State, stats: nnx.State, sharding: Sharding) -> dict[str, Any]:
    """{"params": (params, stats), "ema": the same, averaged, if it was kept}, for evaluation: no optimizer is read."""
    trees = {"model": (params, stats)}
    if self.meta(step)["config"]["optim"]["ema_decay"] is not None:
      trees["ema"] = (params, stats)
    found = self._restore(step, trees, sharding)
    return {"params" if name == "model" else name: tree for name, tree in found.items()}

  def _restore(self, step: int, trees: dict[str, Any], sharding: Sharding) -> dict[str, Any]:
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    wanted = {name: jax.tree.map(abstract, _named(tree)) for name, tree in trees.items()}
    shapes = self.meta(step)["shapes"]
    for name, arrays in wanted.items():
      saved = {key: tuple(shape) for key, shape in shapes[name].items()}
      expected = {key: value.shape for key, value in arrays.items()}
      if saved != expected:
        odd = sorted(key for key in saved | expected if saved.get(key) != expected.get(key))
        lines = ", ".join(f"{key.replace('.', '/')} (saved {saved.get(key, 'not there')}, "
                          f"expected {expected.get(key, 'not there')})" for key in odd[:3])
        raise CheckpointError(f"{self.path(step)} holds another network: {len(odd)} arrays differ: {lines}")
    found = self._manager.restore(step, args=ocp.args.Composite(
        **{name: ocp.args.StandardRestore(arrays) for name, arrays in wanted.items()}))
    return {name: jax.tree.unflatten(jax.tree.structure(tree), list(_reorder(found[name], tree))) for name, tree in trees.items()}

  def wait(self) -> None:
    self._manager.wait_until_finished()

  def close(self) -> None:
    if self._manager:
      self._manager.close()


def check_same_run(saved: dict[str, Any], config: Config, where: str, *, only: tuple[str, ...] = ("",)) -> None:
  """Raises CheckpointError where a checkpoint's configuration is not this one's, naming the fields.

  `only`: prefixes of the fields to compare, all by default. A field that is newer than the checkpoint had its default.
  """
  defaults = to_json(Config())
  saved = {key: {**defaults[key], **value} if isinstance(defaults.get(key), dict) else value for key, value in saved.items()}
  before, now = _flat({**defaults, **saved}), _flat(to_json(config))
  odd = sorted(key for key in before | now if before.get(key) != now.get(key) and key not in MAY_DIFFER
               and key.startswith(only))
  if odd:
    lines = ", ".join(f"config.{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in odd[:4])
    raise CheckpointError(f"{where} belongs to another configuration: {lines}{' …' if len(odd) > 4 else ''}; take another "
                          "directory, or the configuration it was started with")


def to_json(config: Config) -> dict[str, Any]:
  """The configuration as JSON has it (tuples become lists)."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  out = {}
  for key, value in tree.items():
    out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
  return out


def _named(tree: Any) -> dict[str, Any]:
  # Orbax makes a directory of a name with "/" in it, and cannot write an empty tree.
  named = {path.replace("/", "."): leaf for path, leaf, _ in named_leaves(tree) if jax.tree.leaves(leaf)}
  return named or {"nothing": jax.numpy.zeros(())}


def _reorder(named: dict[str, jax.Array], tree: Any):
  return (named[path.replace("/", ".")] for path, leaf, _ in named_leaves(tree) if jax.tree.leaves(leaf))
