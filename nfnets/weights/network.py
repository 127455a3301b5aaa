"""Puts stored arrays into a network: every array finds its place, or the call fails and names what is left over."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from nfnets import models
from nfnets.agc import named_leaves
from nfnets.weights.errors import WeightsError
from nfnets.weights.stored import Stored

HEAD = "fc/"  # what the names of a classifier's arrays begin with


def fill(like: Any, arrays: Mapping[str, np.ndarray], source: str) -> Any:
  """Returns the tree `like` with stored arrays in the places of its leaves.

  Args:
    like: a tree of arrays or their shapes, such as an nnx.State; leaves without elements stay.
    arrays: by the names that `nfnets.agc.named_leaves` gives the leaves, such as "blocks/3/conv1/kernel".
    source: where the arrays come from, for messages.

  Raises:
    WeightsError: an array is missing, left over, or has another shape; the message names the first three.
  """
  leaves = [(name, leaf) for name, leaf, _ in named_leaves(like)]
  wanted = {name: tuple(leaf.shape) for name, leaf in leaves}
  have = {name: tuple(array.shape) for name, array in arrays.items()}
  problems = [f"{name} {wanted[name]} is missing" for name in wanted if name not in have]
  problems += [f"{name} {have[name]} is left over" for name in have if name not in wanted]
  problems += [
    f"{name} is {have[name]}, expected {shape}" for name, shape in wanted.items() if name in have and have[name] != shape
  ]
  problems += [
    f"{name} is {array.dtype}, expected numbers with a fraction" for name, array in arrays.items() if array.dtype.kind not in "fV"
  ]
  if problems:
    more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise WeightsError(f"{source} holds another network: {'; '.join(problems[:3])}{more}")
  filled = [jax.numpy.asarray(arrays[name], leaf.dtype) for name, leaf in leaves]
  return jax.tree.unflatten(jax.tree.structure(like), filled)


def build(stored: Stored, *, num_classes: int | None = None, dtype: Any = None, rngs: Any = 0) -> models.Network:
  """Makes the network that the arrays belong to.

  Args:
    stored: the arrays and the configuration that names the network.
    num_classes: gives the network a new classifier of so many classes, drawn from `rngs`; None keeps the stored one.
    dtype: what convolutions compute in; None as in training.
    rngs: as for `nfnets.models.create`.

  Raises:
    WeightsError: the arrays do not fit. UserError: the configuration names no network of this nfnets.
  """
  model, arrays = stored.config.model, stored.arrays
  overrides = {name: value for name, value in model.all_overrides().items() if name != "scan"}  # that is for training
  if sum(models.variant(model.name, **overrides).depth) > len(arrays):
    raise WeightsError(f"{stored.source} has {len(arrays)} arrays, fewer than {model.name} has blocks")
  make = lambda: models.create(model.name, num_classes or stored.num_classes, rngs=rngs, dtype=dtype or model.dtype, **overrides)
  graph, state, others = nnx.split(nnx.eval_shape(make), nnx.Any(nnx.Param, nnx.BatchStat), ...)
  if num_classes is None:
    return nnx.merge(graph, fill(state, arrays, stored.source), others)
  body = fill(without_head(state), headless(arrays), stored.source)  # before a network of that size is made
  network = make()
  nnx.update(network, body)
  return network


def without_head(state: nnx.State) -> nnx.State:
  """The state of a network without that of its classifier."""
  return nnx.State({name: branch for name, branch in state.items() if f"{name}/" != HEAD})


def headless(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The arrays of a network without those of its classifier."""
  return {name: array for name, array in arrays.items() if not name.startswith(HEAD)}
