"""Equal blocks of a network as one: parameters stacked, [blocks, ...], so that a loop runs them and one update is for all."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Runs = tuple[tuple[int, int], ...]  # a network's blocks in stretches [start, stop)
Blocks = dict[int, Any]  # parameters by number


def numbers(blocks: Sequence[Any]) -> dict[str, tuple[float, ...]]:
  """The numbers in which equal blocks of a stage differ, by name, of each block."""
  return {name: tuple(getattr(block, name) for block in blocks) for name in ("beta", "drop_rate") if hasattr(blocks[0], name)}


def equal_blocks(blocks: Sequence[Any]) -> Runs:
  """Divides the blocks into stretches [start, stop) of equal ones, but for their `numbers` and the values of parameters.

  Blocks with running statistics, which a loop would have to hand out again, stay alone.
  """

  def kind(block: Any) -> tuple[Any, ...] | None:
    own = numbers([block])
    for name in own:
      setattr(block, name, 0.0)
    graph, state = nnx.split(block)
    for name, (value,) in own.items():
      setattr(block, name, value)
    if jax.tree.leaves(nnx.filter_state(state, nnx.BatchStat)):
      return None
    return graph, tuple(leaf.shape for leaf in jax.tree.leaves(state))

  kinds = [kind(block) for block in blocks]
  starts = [i for i in range(len(blocks)) if i == 0 or kinds[i] is None or kinds[i] != kinds[i - 1]]
  return tuple(zip(starts, [*starts[1:], len(blocks)], strict=True))


def stack(tree: Any, runs: Runs) -> Any:
  """Stacks the equal blocks of every nnx.State of a network's parameters in `tree`: blocks/3 … blocks/8 become one, blocks/3.

  Its variables have the metadata `blocks`, the run's (start, stop), by which `unstack` and the optimizer know them.

  Args:
    tree: parameters, or what holds trees like them: an optimizer's state, a whole TrainState.
    runs: of the network; blocks that are alone in theirs, or in none, stay as they are.
  """

  def change(blocks: Blocks) -> Blocks:
    changed = dict(blocks)
    for start, stop in runs:
      same = [changed.pop(i) for i in range(start, stop)]
      changed[start] = same[0] if len(same) == 1 else _map(functools.partial(_joined, (start, stop)), *same)
    return changed

  return _replaced(tree, change)


def unstack(tree: Any) -> Any:
  """The tree that `stack` was given."""

  def change(blocks: Blocks) -> Blocks:
    changed = dict(blocks)
    for start, stop in filter(None, map(_run_of, blocks.values())):
      parts = _map(_parts, blocks[start])
      changed |= {i: _map(operator.itemgetter(i - start), parts) for i in range(start, stop)}
    return changed

  return _replaced(tree, change)


def runs_of(params: nnx.State) -> Runs:
  """The runs that are stacked in parameters."""
  return tuple(filter(None, map(_run_of, params.raw_mapping.get("blocks", {}).values())))


def _run_of(block: Any) -> tuple[int, int] | None:
  """Which blocks, [start, stop), the parameters of a block are those of, stacked; None of one block's own."""
  variables = jax.tree.leaves(block, is_leaf=_is_variable)
  return variables[0].get_metadata().get("blocks") if variables and _is_variable(variables[0]) else None


def _joined(run: tuple[int, int], *variables: nnx.Variable) -> nnx.Variable:
  """The stack of one variable of each block. A value may also be an empty tree, which an optimizer puts where it has nothing."""
  joined = variables[0].copy(jax.tree.map(_stacked, *(variable.get_value() for variable in variables)))
  joined.set_metadata(blocks=run)
  return joined


def _parts(stacked: nnx.Variable) -> list[nnx.Variable]:
  metadata = {name: value for name, value in stacked.get_metadata().items() if name != "blocks"}
  start, stop = stacked.get_metadata()["blocks"]
  rows = jax.tree.map(_rows, stacked.get_value())
  part = lambda i: jax.tree.map(operator.itemgetter(i), rows, is_leaf=lambda node: isinstance(node, list))
  return [type(stacked)(part(i), **metadata) for i in range(stop - start)]


def _stacked(*arrays: Any) -> jax.Array:
  """The arrays as one; on the host where they are there, so that no program is compiled for each shape."""
  if any(isinstance(x, jax.core.Tracer) for x in arrays):
    return jnp.stack(arrays)
  return jnp.asarray(np.stack(arrays))


@jax.jit  # so that it is compiled once for each shape
def _rows(x: jax.Array) -> list[jax.Array]:
  return list(x)


_is_variable = lambda node: isinstance(node, nnx.Variable)


def _map(function: Callable[..., Any], *trees: Any) -> Any:
  return jax.tree.map(function, *trees, is_leaf=lambda node: isinstance(node, nnx.Variable | list))


def _replaced(tree: Any, change: Callable[[Blocks], Blocks]) -> Any:
  is_network = lambda node: isinstance(node, nnx.State) and "blocks" in node

  def replace(node: Any) -> Any:
    parts = node.raw_mapping if is_network(node) else None
    return node if parts is None else nnx.State({**parts, "blocks": change(parts["blocks"])})

  return jax.tree.map(replace, tree, is_leaf=is_network)
