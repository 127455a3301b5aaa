"""Folds a program: what does not depend on the images is computed once, and scales and shifts vanish in convolutions.

So weight standardization, gain, gamma, beta, alpha, skip gain and the normalization by running statistics leave no operation
behind where a convolution or a matrix product stands next to them. Where a gate stands between, its channels are scaled, which is
one small multiplication an image. The exceptions keep their operations: a BatchNorm that reads a sum of branches, a scalar bias
of Fixup before a padded convolution, group, layer and instance normalization.

The method: every value is known as scale · base + shift with constant scale and shift (a number, or one for each channel).
Multiplying or adding a constant changes these only; an operation that is linear lets the scale pass; a convolution takes it into
its kernel; what is left is computed where some operation needs the value itself.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from nfnets.export.program import Node, Program, convolution, elements

# Operations with f(s · x) = s · f(x) for every number s, reading one value.
_LINEAR = {"broadcast_in_dim", "reduce_sum", "reduce_window_sum", "reshape", "slice", "squeeze", "transpose"}

# What NumPy computes in the place of JAX, which would compile a program for every shape of a kernel.
_NUMPY: dict[str, Callable[..., np.ndarray]] = {
  "add": np.add,
  "sub": np.subtract,
  "mul": np.multiply,
  "div": np.divide,
  "max": np.maximum,
  "square": np.square,
  "rsqrt": lambda x: 1 / np.sqrt(x),
  "reduce_sum": np.sum,
}


@dataclasses.dataclass(eq=False, repr=False, slots=True)
class _Affine:
  """The value scale · base + shift, with the shape and dtype of the node that it stands for.

  Attributes:
    base: an operation's value, or the input.
    scale, shift: float64, [] or with the channels' as their only axis longer than 1; shift None is 0.
    shared: whether several operations read the value, so that a convolution under it must not be computed once for each.
    open: whether the base is a convolution or matrix product that nothing else reads, which can take scale and shift in.
    forced: the node that holds the value itself, once it was needed.
  """

  base: Node
  like: Node
  shared: bool
  open: bool
  scale: np.ndarray = dataclasses.field(default_factory=lambda: np.ones(()))
  shift: np.ndarray | None = None
  forced: Node | None = None


def fold(program: Program) -> Program:
  """Returns a program with the same results up to rounding, which computes less; see the module."""
  nodes = program.nodes()
  uses = collections.Counter(child for node in nodes for child in node.inputs)
  values: dict[Node, Any] = {}  # a constant Node, or an _Affine
  for node in nodes:
    inputs = [values[child] for child in node.inputs]
    if node.primitive is None:
      result = node
    elif node.op == "platform_index":
      result = node
    elif all(isinstance(value, Node) for value in inputs):
      result = _evaluate(node, inputs)
    else:
      result = _rewrite(node, inputs, uses[node] > 1)
    if isinstance(result, Node) and result.constant is None:
      result = _Affine(result, node, uses[node] > 1, _foldable(result))
    values[node] = result
  return Program(program.input, _force(values[program.output]))


# ---- constants


def _evaluate(node: Node, inputs: list[Node]) -> Node:
  """Computes an operation of constants. What is only repeated stays small, and casts to fewer bits are left for the end."""
  name = next((value.name for value in inputs if value.name), "")
  constant = lambda value: Node(shape=node.shape, dtype=node.dtype, constant=value, name=name)
  if node.op == "convert_element_type" and all(map(_is_float, (node, inputs[0]))):
    return constant(inputs[0].constant)
  if node.op == "broadcast_in_dim":
    shape, axes = [1] * len(node.shape), node.params["broadcast_dimensions"]
    small = inputs[0].constant
    for axis, size in zip(axes, small.shape, strict=True):
      shape[axis] = size
    return constant(small.reshape(shape))
  if not all(isinstance(size, int) for value in inputs for size in value.shape):
    return Node(node.shape, node.dtype, node.primitive, node.params, tuple(inputs))
  arrays = [np.asarray(value.constant, np.float64 if _is_float(value) else value.dtype) for value in inputs]
  arrays = [np.broadcast_to(array, value.shape) for array, value in zip(arrays, inputs, strict=True)]
  if node.op in _NUMPY:
    result = _NUMPY[node.op](*arrays, **({"axis": node.params["axes"]} if node.op == "reduce_sum" else {}))
  else:  # in float32, though the program may have fewer bits
    result = node.primitive.bind(*(jnp.asarray(array.astype(_bits(array))) for array in arrays), **node.params)
  return constant(np.asarray(result).astype(np.float32 if _is_float(node) else node.dtype))


def _bits(array: np.ndarray) -> Any:
  return np.float32 if array.dtype == np.float64 else array.dtype


def _is_float(node: Node) -> bool:
  return jnp.issubdtype(node.dtype, jnp.floating)


def _factor(value: Any, like: Node) -> np.ndarray | None:
  """A constant as one number, or as one for each channel, to be combined with `like`; None for anything else."""
  if not isinstance(value, Node) or not _is_float(value):
    return None
  array = np.asarray(value.constant, np.float64)
  if array.size and (array == array.flat[0]).all():
    return np.array(array.flat[0])
  channels = array.ndim == len(like.shape) and array.size == array.shape[-1]
  return array if channels else None


# ---- operations


def _rewrite(node: Node, inputs: list[Any], shared: bool) -> Any:
  """The value of an operation that depends on the images: an _Affine, or a node to make one of."""
  affine = next(value for value in inputs if isinstance(value, _Affine))
  if node.op in ("mul", "div", "add", "sub", "neg"):
    constants = [_factor(value, node) for value in inputs]
    if len(inputs) == 1 or constants[0] is not None or constants[1] is not None:
      result = _combine(node, inputs, constants, _shareable(affine), shared)
      if result is not None:
        return result
    elif node.op == "mul" and not any(isinstance(value, Node) for value in inputs):
      left, right = _scaled(inputs[0]), _scaled(inputs[1])
      product = _emit(node, [left.base, right.base])
      return _Affine(product, node, shared, False, left.scale * right.scale)
  if node.op == "convert_element_type" and _is_float(node) and _is_float(affine.like):
    affine = _shareable(affine)
    if affine.open or node.dtype == affine.base.dtype:
      return _Affine(affine.base, node, shared, affine.open, affine.scale, affine.shift)
  kernel = _kernel(node)
  if kernel is not None and isinstance(inputs[kernel], Node) and isinstance(inputs[kernel - 1], _Affine):
    source = _scaled(inputs[kernel - 1])
    inputs = [*inputs[: kernel - 1], source.base, _times(inputs[kernel], source.scale)]
    return _emit(node, [value if isinstance(value, Node) else _force(value) for value in inputs])
  if node.op in _LINEAR or node.op == "convert_element_type" and _is_float(node) and _is_float(affine.like):
    affine = _scaled(affine)
    return _Affine(_emit(node, [affine.base]), node, shared, False, affine.scale)
  return _emit(node, [value if isinstance(value, Node) else _force(value) for value in inputs])


def _combine(node: Node, inputs: list[Any], constants: list[Any], affine: _Affine, shared: bool) -> _Affine | None:
  """A constant times, by or plus the value of `affine`; None where it divides by that value."""
  first = isinstance(inputs[0], _Affine)
  constant = constants[-1] if first else constants[0]
  scale, shift = affine.scale, affine.shift
  if node.op == "neg":
    scale, shift = -scale, None if shift is None else -shift
  elif node.op == "mul" or node.op == "div" and first:
    constant = constant if node.op == "mul" else 1 / constant
    scale, shift = scale * constant, None if shift is None else shift * constant
  elif node.op == "div":
    return None
  else:
    sign = -1 if node.op == "sub" else 1
    if not first:  # constant ± value
      scale, shift = sign * scale, None if shift is None else sign * shift
    constant = sign * constant if first else constant
    shift = constant if shift is None else shift + constant
  return _Affine(affine.base, node, shared, affine.open, scale, shift)


def _shareable(affine: _Affine) -> _Affine:
  """The value in a form that another may be made of: a convolution that several operations read is computed for all of them."""
  return _Affine(_force(affine), affine.like, True, False) if affine.shared and affine.open else affine


def _scaled(affine: _Affine) -> _Affine:
  """The value as a number times its base."""
  affine = _shareable(affine)
  if affine.shift is not None or affine.scale.ndim:
    return _Affine(_force(affine), affine.like, affine.shared, False)
  return affine


def _kernel(node: Node) -> int | None:
  """Which input is the kernel, for a convolution, or a matrix product [batch, in] · [in, out]; the one before it is the image."""
  if convolution(node) is not None:
    return len(node.inputs) - 1
  matrices = node.op == "dot_general" and node.params["dimension_numbers"] == (((1,), (0,)), ((), ())) and len(node.shape) == 2
  return 1 if matrices else None


def _foldable(node: Node) -> bool:
  """Whether the node is a convolution or matrix product whose kernel is constant."""
  kernel = _kernel(node)
  return kernel is not None and node.inputs[kernel].constant is not None


def _times(kernel: Node, scale: np.ndarray) -> Node:
  """The constant kernel [..., out] times a number or one for each output channel."""
  if scale.ndim == 0 and scale == 1:
    return kernel
  value = (np.asarray(kernel.constant, np.float64) * scale.reshape(-1)).astype(np.float32)
  return dataclasses.replace(kernel, constant=value)


def _emit(node: Node, inputs: list[Node]) -> Node:
  """The operation of `node`, on other inputs."""
  return Node(node.shape, node.dtype, node.primitive, node.params, tuple(inputs))


# ---- where a value itself is needed


def _force(affine: _Affine) -> Node:
  """The node that holds the value, made where it is first needed."""
  if affine.forced is None:
    affine.forced = _computed(affine)
  return affine.forced


def _computed(affine: _Affine) -> Node:
  base, like = affine.base, affine.like
  kernel = _kernel(base) if affine.open else None
  if kernel is None and base.dtype != like.dtype:
    base = _cast(base, like.dtype)
  if affine.scale.ndim or affine.scale != 1:
    if kernel is not None:
      base = _emit(base, [*base.inputs[:kernel], _times(base.inputs[kernel], affine.scale)])
    else:
      base = _multiplied(base, affine.scale)
  if affine.shift is not None and (affine.shift.ndim or affine.shift != 0):
    base = _binary(lax.add_p, base, affine.shift, _name(base, kernel))
  return base if base.dtype == like.dtype else _cast(base, like.dtype)


def _name(base: Node, kernel: int | None) -> str:
  """What to call the bias of a convolution: after its kernel."""
  name = base.inputs[kernel].name if kernel is not None else ""
  return f"{name.removesuffix('kernel')}bias" if name else ""


def _multiplied(base: Node, scale: np.ndarray) -> Node:
  """base · scale; of a product with a repeated factor, such as a gate, that factor is multiplied before it is repeated."""
  if base.op == "mul" and scale.ndim == 0:
    for i, factor in enumerate(base.inputs):
      if factor.op == "broadcast_in_dim" and elements(factor.inputs[0].shape) < elements(base.shape):
        smaller = _emit(factor, [_binary(lax.mul_p, factor.inputs[0], scale)])
        return _emit(base, [smaller if j == i else other for j, other in enumerate(base.inputs)])
  return _binary(lax.mul_p, base, scale)


def _binary(primitive: Any, base: Node, constant: np.ndarray, name: str = "") -> Node:
  value = Node(base.shape, base.dtype, constant=constant.astype(np.float32), name=name)
  return Node(base.shape, base.dtype, primitive, {}, (base, value))


def _cast(node: Node, dtype: Any) -> Node:
  params = {"new_dtype": jnp.dtype(dtype), "weak_type": False, "sharding": None}
  return Node(node.shape, dtype, lax.convert_element_type_p, params, (node,))
