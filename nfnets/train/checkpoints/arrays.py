"""A training state's arrays by path, as checkpoints hold them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from nfnets.agc import named_leaves
from nfnets.train.step.state import TrainState

Shapes = dict[str, list[Any]]  # by path: [dtype, shape], as JSON has it


def split(state: TrainState) -> dict[str, Any]:
  """Takes a state apart into the trees that are saved, by item; all but `halted`. New fields of TrainState go to "training"."""
  others = {field.name for field in dataclasses.fields(state)} - {"params", "stats", "ema", "halted"}
  return {
    "model": {"params": state.params, "stats": state.stats},
    "ema": state.ema and dict(zip(("params", "stats"), state.ema, strict=True)),
    "training": {name: getattr(state, name) for name in sorted(others)},
  }


def join(trees: dict[str, Any], like: TrainState) -> TrainState:
  """Puts the state together again that `split` took apart; `halted` is False."""
  ema = trees["ema"] and (trees["ema"]["params"], trees["ema"]["stats"])
  return dataclasses.replace(like, **trees["model"], ema=ema, **trees["training"], halted=_zeros(like.halted))


def by_name(tree: Any) -> dict[str, Any]:
  """The arrays of a tree by their names for Orbax; those without elements, which it refuses, are left out."""
  leaves = [(path, leaf) for path, leaf in _leaves(tree) if leaf.size]
  named = {name(path): leaf for path, leaf in leaves}
  if len(named) < len(leaves):
    raise ValueError(f"{len(leaves)} arrays, only {len(named)} names: {', '.join(sorted(named)[:3])} …; none may have a dot")
  return named


def name(path: str) -> str:
  """A path as Orbax's name of an array; it would make a directory of a name with "/" in it."""
  return path.replace("/", ".")


def shapes(tree: Any) -> Shapes:
  """Dtype and shape of every array with elements, by its path."""
  return {path: [str(leaf.dtype), list(leaf.shape)] for path, leaf in _leaves(tree) if leaf.size}


def differences(saved: Shapes, expected: Shapes) -> list[str]:
  """A line for each array that is not the same."""
  show = lambda array: f"{array[0]} {tuple(array[1])}" if array else "not there"
  return [
    f"{path} (saved {show(saved.get(path))}, expected {show(expected.get(path))})"
    for path in sorted(saved | expected)
    if saved.get(path) != expected.get(path)
  ]


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  """Shape, dtype and sharding of an array; one without a sharding goes to the first device."""
  sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def fill(tree: Any, named: Mapping[str, jax.Array]) -> Any:
  """Returns `tree` with the arrays of `named`, whose keys are those of `by_name`."""
  leaves = [named[name(path)] if leaf.size else _zeros(leaf) for path, leaf in _leaves(tree)]
  return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
  return [(path, leaf) for path, leaf, _ in named_leaves(tree) if jax.tree.leaves(leaf)]


def _zeros(leaf: Any) -> jax.Array:
  like = abstract(leaf)
  return jax.make_array_from_callback(like.shape, like.sharding, lambda index: np.zeros(like.shape, like.dtype)[index])
