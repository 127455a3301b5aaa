"""Networks whose equal blocks are stacked (nfnets.models.loops): AGC of each block, and whether all can be updated at once."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nfnets.agc import AGCState, named_leaves
from nfnets.config import OptimConfig
from nfnets.optim.groups import default_groups, parameter_groups

Run = tuple[int, int]  # blocks [start, stop)


def are_alike(params: Any, runs: Iterable[Run], config: OptimConfig) -> bool:
  """Whether the optimizer does the same to all blocks of each run, parameter by parameter, so that they can be stacked.

  Args:
    params: tree of arrays or of `jax.ShapeDtypeStruct`, not stacked, with the names of `nfnets.models`.
    runs: of the network.
    config: `layer_decay`, `frozen` and `agc_exclude` can tell blocks apart (the groups are `default_groups`). LARS's trust
      ratios are those of whole arrays.
  """
  if config.name == "lars" or config.layer_decay != 1:
    return False
  owners = parameter_groups(params, default_groups(params, config))
  first = {f"blocks/{i}/": f"blocks/{start}/" for start, stop in runs for i in range(start + 1, stop)}
  there = lambda path: "/".join(path.split("/")[:2]) + "/"  # "blocks/3/" of a parameter of that block
  stacked = [path for path in owners if there(path) not in first]
  return all(
    owners[path] is owners[path.replace(there(path), first[there(path)], 1)] for path in owners if there(path) in first
  ) and all(any(re.search(pattern, path) for path in stacked) for pattern in (*config.frozen, *config.agc_exclude))


def by_block(agc: optax.GradientTransformation) -> optax.GradientTransformation:
  """AGC for a tree of which blocks may be stacked: every unit is clipped, and counted by its own name, as where none are.

  Args:
    agc: without a schedule. It sees paths, of a stack those of its first block, but no marks of variables.
  """
  begin: Callable[..., Any] = agc.init  # optax has no type for the state of a link

  def clip(grads: Any, params: Any) -> tuple[Any, Any]:
    return agc.update(grads, begin(params), params)

  def init(params: Any) -> Any:
    parts = _parts(params)
    if parts.keys() == {None}:
      return agc.init(params)
    return _joined({run: (jax.vmap(begin) if run else begin)(part) for run, part in parts.items()})

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    parts = _parts(params)
    if params is None or parts.keys() == {None}:
      return agc.update(updates, state, params)
    grads = {path: leaf for path, leaf, _ in named_leaves(updates)}
    states = {}
    for run, part in parts.items():
      clipped, states[run] = (jax.vmap(clip) if run else clip)({path: grads[path] for path in part}, part)
      grads |= clipped
    return jax.tree.unflatten(jax.tree.structure(updates), list(grads.values())), _joined(states)

  return optax.GradientTransformation(init, update)


def _parts(params: Any) -> dict[Run | None, dict[str, Any]]:
  """The parameters of each stack, by path, and under None those of none."""
  parts: dict[Run | None, dict[str, Any]] = {None: {}}
  for path, leaf, metadata in named_leaves(params):
    parts.setdefault(metadata.get("blocks"), {})[path] = leaf
  return parts


def _joined(states: dict[Run | None, AGCState]) -> AGCState:
  """The state for the tree that is not stacked, of the states of the parts; those of stacks have an axis of blocks."""
  whole = states[None]
  if whole.paths is None:
    return whole
  paths = [*whole.paths]
  for run, state in states.items():
    for start, i in ((run[0], i) for i in range(*run)) if run else ():
      paths += [path.replace(f"blocks/{start}/", f"blocks/{i}/") for path in state.paths or ()]
  order = sorted(range(len(paths)), key=paths.__getitem__)
  columns = [
    jnp.concatenate([getattr(state, field).ravel() for state in states.values()])[jnp.array(order)]
    for field in AGCState._fields[2:]
  ]
  return AGCState(None, dict.fromkeys(paths[i] for i in order), *columns)
