"""A network's inference as a graph of primitive operations, which can be rewritten, run and written in other formats.

Everything here works on the program that JAX traces, not on layers, so that it needs no word about any family of networks.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core

from nfnets import models

Array = jax.Array
Pixels = tuple[Sequence[float], Sequence[float]]  # mean and std by channel, on the scale 0-255


@dataclasses.dataclass(eq=False, repr=False, slots=True)
class Node:
  """A value of the program.

  Attributes:
    shape, dtype: of the value; the batch may be a symbolic dimension.
    primitive: JAX's operation that makes it; None for a constant and for the program's input.
    params: of the operation, as JAX has them.
    inputs: what the operation reads.
    constant: of a constant, its value; its shape may have ones where `shape` has more, its dtype may be wider than `dtype`.
    name: of a constant, which parameter it is or was made of.
  """

  shape: tuple[Any, ...]
  dtype: Any
  primitive: Any = None
  params: dict[str, Any] = dataclasses.field(default_factory=dict)
  inputs: tuple["Node", ...] = ()
  constant: Any = None
  name: str = ""

  @property
  def op(self) -> str:
    """The operation's name; "constant" and "input" have none."""
    if self.primitive is not None:
      return self.primitive.name
    return "input" if self.constant is None else "constant"


def convolution(node: Node) -> dict[str, Any] | None:
  """The parameters of the convolution that the node is, else None.

  A grouped convolution has one form for CPUs and one for the rest (`convolution.convolve`), of which the latter is described.
  """
  if node.op == "conv_general_dilated":
    return node.params
  if node.op == "cond" and node.params.get("branches_platforms"):
    for eqn in _default_branch(node.params).jaxpr.eqns:
      if eqn.primitive.name == "conv_general_dilated":
        return eqn.params
  return None


def _default_branch(params: dict[str, Any]) -> core.ClosedJaxpr:
  """What platforms run that jax.lax.platform_dependent has no form for; it comes last."""
  return params["branches"][-1]


@dataclasses.dataclass(frozen=True)
class Program:
  """From `input` to `output`; only what the output needs counts."""

  input: Node
  output: Node

  def nodes(self) -> list[Node]:
    """All values that the output needs, each after those that it reads."""
    order: dict[Node, None] = {}
    stack: list[tuple[Node, Iterator[Node]]] = [(self.output, iter(self.output.inputs))]
    while stack:
      node, rest = stack[-1]
      following = next((child for child in rest if child not in order), None)
      if following is None:
        order[node] = None
        stack.pop()
      else:
        stack.append((following, iter(following.inputs)))
    return list(order)

  def operations(self) -> list[Node]:
    """The values that an operation computes each time the program runs; which platform it runs on is no computation."""
    return [node for node in self.nodes() if node.primitive is not None and node.op != "platform_index"]

  def weights_bytes(self) -> int:
    """The bytes of all constants, in the program's dtypes."""
    return sum(node.constant.size * jnp.dtype(node.dtype).itemsize for node in self.nodes() if node.constant is not None)

  def __call__(self, images: Array) -> Array:
    """Runs the program; under jit or export it is traced as any JAX function. `images` have the traced shape and dtype."""
    values: dict[Node, Any] = {self.input: images}
    for node in self.nodes():
      if node.primitive is not None:
        result = node.primitive.bind(*(values[child] for child in node.inputs), **node.params)
        values[node] = result[0] if node.primitive.multiple_results else result
      elif node.constant is not None:
        values[node] = jnp.broadcast_to(jnp.asarray(node.constant, node.dtype), node.shape)
    return values[self.output]


def trace(fn: Callable[[Any, Array], Array], parameters: Any, shape: tuple[Any, ...], dtype: Any = jnp.float32) -> Program:
  """Traces fn(parameters, images) → one array into a program, in which the parameters are constants.

  Args:
    fn: what `jax.jit` could trace.
    parameters: a tree of arrays.
    shape: of the images; the batch may be symbolic (`jax.export.symbolic_shape`).
    dtype: of the images.
  """
  named = lambda path: jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")  # of an nnx.Variable
  closed = jax.make_jaxpr(fn)(parameters, jax.ShapeDtypeStruct(shape, dtype))
  images = Node(shape=shape, dtype=jnp.dtype(dtype))
  constants = [
    Node(shape=leaf.shape, dtype=leaf.dtype, constant=np.asarray(leaf), name=named(path))
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)
  ]
  (output,) = _inline(closed, [*constants, images])
  return Program(images, output)


def of_network(network: models.Network, shape: tuple[Any, ...], uint8: Pixels | None = None) -> Program:
  """Traces the network's logits into a program; arguments as for `logits`.

  Args:
    shape: of the images, [batch, height, width, 3]; the batch may be symbolic.
  """
  fn, state = logits(network, uint8)
  return trace(fn, state, shape, jnp.float32 if uint8 is None else jnp.uint8)


def logits(network: models.Network, uint8: Pixels | None = None) -> tuple[Callable[[Any, Array], Array], Any]:
  """Returns fn(state, images) → logits, and the network's state.

  Args:
    network: any of nfnets.models.
    uint8: mean and std by channel, with which images that are uint8 are normalised; None takes normalised float32.
  """
  graph, state = nnx.split(network)

  def fn(state: Any, images: Array) -> Array:
    if uint8 is not None:
      mean, std = (jnp.asarray(value, jnp.float32) for value in uint8)
      images = (images.astype(jnp.float32) - mean) / std
    return nnx.merge(graph, state)(images)

  return fn, state


def _inline(closed: core.ClosedJaxpr, arguments: list[Node]) -> list[Node]:
  """Builds the nodes of a traced program, and of those that it calls, in one graph; returns those of its results."""
  jaxpr = closed.jaxpr
  values: dict[Any, Node] = dict(zip(jaxpr.invars, arguments, strict=True))
  values |= {var: _constant(const, var.aval) for var, const in zip(jaxpr.constvars, closed.consts, strict=True)}
  read = lambda atom: _constant(atom.val, atom.aval) if isinstance(atom, core.Literal) else values[atom]
  for eqn in jaxpr.eqns:
    inputs = [read(atom) for atom in eqn.invars]
    called = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if called is not None:
      called = called if isinstance(called, core.ClosedJaxpr) else core.ClosedJaxpr(called, ())
      results = _inline(called, inputs)
    elif eqn.primitive.name == "copy":
      results = inputs
    else:
      if len(eqn.outvars) != 1:
        raise NotImplementedError(
          f"{eqn.primitive.name} has {len(eqn.outvars)} results, and only operations with one are supported"
        )
      aval = eqn.outvars[0].aval
      results = [Node(shape=aval.shape, dtype=aval.dtype, primitive=eqn.primitive, params=eqn.params, inputs=tuple(inputs))]
    values |= dict(zip(eqn.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _constant(value: Any, aval: Any) -> Node:
  return Node(shape=aval.shape, dtype=aval.dtype, constant=np.asarray(value))


def elements(shape: tuple[Any, ...]) -> int:
  """The number of elements for one image: a symbolic batch counts as 1."""
  return math.prod(size for size in shape if isinstance(size, int))
