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
  """The trees that are saved, by item; any field that TrainState gets is part of "training" at once. `halted` is not saved."""
  others = {field.name for field in dataclasses.fields(state)} - {"params", "stats", "ema", "halted"}
  return {
    "model": {"params": state.params, "stats": state.stats},
    "ema": state.ema and dict(zip(("params", "stats"), state.ema, strict=True)),
    "training": {name: getattr(state, name) for name in sorted(others)},
  }


def join(trees: dict[str, Any], like: TrainState) -> TrainState:
  """The state that `split` took apart, with the remaining field as in a state that goes on."""
  ema = trees["ema"] and (trees["ema"]["params"], trees["ema"]["stats"])
  return dataclasses.replace(like, **trees["model"], ema=ema, **trees["training"], halted=_zeros(like.halted))


def by_name(tree: Any) -> dict[str, Any]:
  """The arrays of a tree by what Orbax is to call them; those without elements, which it refuses, are left out."""
  leaves = [(path, leaf) for path, leaf in _leaves(tree) if leaf.size]
  found = {name(path): leaf for path, leaf in leaves}
  if len(found) < len(leaves):
    raise ValueError(f"{len(leaves)} arrays, only {len(found)} names: {', '.join(sorted(found)[:3])} …; none may have a dot")
  return found


def name(path: str) -> str:
  return path.replace("/", ".")  # of a name with "/" in it Orbax makes a directory


def shapes(tree: Any) -> Shapes:
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
  """Shape, dtype and sharding; an array that says nothing of where it belongs goes to the first device."""
  sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def fill(tree: Any, found: Mapping[str, jax.Array]) -> Any:
  """`tree` with the arrays of `found`, which are named by `name`."""
  return jax.tree.unflatten(
    jax.tree.structure(tree), [found[name(path)] if leaf.size else _zeros(leaf) for path, leaf in _leaves(tree)]
  )


def _leaves(tree: Any) -> list[tuple[str, Any]]:
  return [(path, leaf) for path, leaf, _ in named_leaves(tree) if jax.tree.leaves(leaf)]


def _zeros(leaf: Any) -> jax.Array:
  like = abstract(leaf)
  return jax.make_array_from_callback(like.shape, like.sharding, lambda index: np.zeros(like.shape, like.dtype)[index])
