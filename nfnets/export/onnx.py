"""Writes a folded program as an ONNX model.

ONNX and its runtimes are at home in [batch, channels, height, width]: every value with four axes is stored so, and only an input
[batch, height, width, channels] is transposed, once. Needs the package onnx (`pip install "nfnets[onnx]"`).
"""

import collections
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from nfnets.errors import UserError
from nfnets.export.program import Node, Program, convolution

OPSET = 17  # of 2022, so that older runtimes read it too
IR_VERSION = 8  # of the file, which goes with it
LIMIT = 2**31 - 1  # bytes of a protobuf
_TO_NCHW, _TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)

# Operations of the same meaning on each element.
_ELEMENTWISE = {
  "abs": "Abs",
  "add": "Add",
  "and": "And",
  "div": "Div",
  "eq": "Equal",
  "erf": "Erf",
  "exp": "Exp",
  "ge": "GreaterOrEqual",
  "gt": "Greater",
  "le": "LessOrEqual",
  "log": "Log",
  "logistic": "Sigmoid",
  "lt": "Less",
  "max": "Max",
  "min": "Min",
  "mul": "Mul",
  "neg": "Neg",
  "not": "Not",
  "or": "Or",
  "sign": "Sign",
  "sqrt": "Sqrt",
  "sub": "Sub",
  "tanh": "Tanh",
}


def model(program: Program, about: dict[str, Any], *, nchw: bool = False) -> onnx.ModelProto:
  """Makes the model, with an input "images" and an output "logits", for any batch.

  Args:
    program: folded, in float32, traced with a symbolic batch.
    about: becomes the metadata, each entry as JSON.
    nchw: whether images come as [batch, 3, height, width] instead of [batch, height, width, 3].

  Raises:
    UserError: the network has an operation that this writer does not know, or is larger than ONNX's 2 GB.
  """
  if (weights := program.weights_bytes()) > LIMIT:
    raise UserError(f"--to=onnx: the weights take {weights:,} bytes, an ONNX file holds {LIMIT:,}; expected --to=stablehlo")
  writer = _Writer(program, nchw)
  height, width, channels = program.input.shape[1:]
  sides = ["batch", channels, height, width] if nchw else ["batch", height, width, channels]
  graph = helper.make_graph(
    writer.nodes,
    "nfnets",
    [helper.make_tensor_value_info("images", helper.np_dtype_to_tensor_dtype(np.dtype(program.input.dtype)), sides)],
    [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", program.output.shape[-1]])],
    writer.constants,
  )
  made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="nfnets")
  helper.set_model_props(made, {name: json.dumps(fact) for name, fact in about.items()})
  onnx.checker.check_model(made)
  return made


class _Writer:
  """Builds the list of ONNX's nodes and constants, in one pass over the program."""

  def __init__(self, program: Program, nchw: bool):
    self.nodes: list[onnx.NodeProto] = []
    self.constants: list[onnx.TensorProto] = []
    self.names: dict[Node, str] = {}  # of the values
    self.small: dict[Node, tuple[Any, ...]] = {}  # values that are not repeated yet, with the shape that they have
    self.taken: set[str] = set()
    order = program.nodes()
    self.readers = collections.Counter(child for node in order for child in node.inputs)
    for node in order:
      if node is program.input:
        self.names[node] = "images" if nchw else self.add("Transpose", "images", perm=_TO_NCHW)
      elif node.primitive is not None and node.op != "platform_index" and node not in self.names:
        self.names[node] = self._write(node)
    self.nodes.append(helper.make_node("Identity", [self.names[program.output]], ["logits"]))

  def add(self, op: str, *inputs: str, **attributes: Any) -> str:
    """Adds an ONNX node and returns the name of its output."""
    name = f"{op.lower()}_{len(self.nodes)}"
    self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
    return name

  def integers(self, values: Sequence[int]) -> str:
    """Adds a list, such as axes or a shape."""
    return self.constant(np.array(values, np.int64))

  def number(self, value: float) -> str:
    """Adds a float32 scalar."""
    return self.constant(np.array(value, np.float32))

  def constant(self, array: np.ndarray, name: str = "constant") -> str:
    """Adds a constant under this name, or a similar one where that is taken."""
    unique = name if name not in self.taken else f"{name}_{len(self.constants)}"
    self.taken.add(unique)
    self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), unique))
    return unique

  def read(self, node: Node) -> str:
    """The name of a value for an operation on each element, which repeats axes of size 1 itself."""
    if node.constant is None:
      return self.names[node]
    array = np.asarray(node.constant).astype(node.dtype)
    return self.constant(array.transpose(_TO_NCHW) if array.ndim == 4 else array, node.name or "constant")

  def whole(self, node: Node) -> str:
    """The name of a value with all its elements."""
    name = self.read(node)
    if node not in self.small:
      return name
    shape = _stored([size if isinstance(size, int) else 1 for size in node.shape])  # 1 keeps the batch as it is
    return self.add("Expand", name, self.integers(shape))

  # ---- operations

  def _write(self, node: Node) -> str:
    """Adds the ONNX nodes of an operation; returns the name of its value."""
    if convolution(node) is not None:
      return self._convolution(node)
    if node.op in _ELEMENTWISE:
      return self.add(_ELEMENTWISE[node.op], *map(self.read, node.inputs))
    method = getattr(self, f"_{node.op}", None)
    if method is None:
      raise UserError(f"--to=onnx: this network has the operation {node.op}, which is not written yet; expected --to=stablehlo")
    return method(node)

  def _convolution(self, node: Node) -> str:
    params, image, kernel = convolution(node), node.inputs[-2], node.inputs[-1]
    assert params is not None
    axes = len(node.shape)
    order = (*range(1, axes - 1),)
    spec = params["dimension_numbers"]
    assert spec.lhs_spec == spec.out_spec == (0, axes - 1, *order)
    assert spec.rhs_spec == (axes - 1, axes - 2, *range(axes - 2))
    weight = np.asarray(kernel.constant, np.float32).transpose(spec.rhs_spec)
    source = self.whole(image)
    if axes == 3:  # over the channels as a sequence, as ECA does
      source = self.add("Transpose", source, perm=(0, 2, 1))
    name = self.add(
      "Conv",
      source,
      self.constant(weight, kernel.name or "kernel"),
      strides=params["window_strides"],
      pads=[low for low, _ in params["padding"]] + [high for _, high in params["padding"]],
      group=params["feature_group_count"],
    )
    return self.add("Transpose", name, perm=(0, 2, 1)) if axes == 3 else name

  def _dot_general(self, node: Node) -> str:
    return self.add("MatMul", *map(self.whole, node.inputs))

  def _reduce_window_max(self, node: Node) -> str:
    return self.add("MaxPool", self.whole(node.inputs[0]), **_window(node))

  def _reduce_window_sum(self, node: Node) -> str:
    """ONNX averages; padded zeros are counted, so that the sum is the average times the window's pixels."""
    window = _window(node)
    mean = self.add("AveragePool", self.whole(node.inputs[0]), count_include_pad=1, **window)
    return self.add("Mul", mean, self.number(math.prod(window["kernel_shape"])))

  def _reduce_sum(self, node: Node) -> str:
    source, name = node.inputs[0], self.whole(node.inputs[0])
    axes = node.params["axes"]
    if len(source.shape) == 4:
      kept = [axis for axis in _TO_NCHW if axis not in axes]
      if kept == sorted(kept):
        axes = [_TO_NCHW.index(axis) for axis in axes]
      else:
        name = self.add("Transpose", name, perm=_TO_NHWC)
    return self._reordered(self.add("ReduceSum", name, self.integers(axes), keepdims=0), node.shape)

  def _broadcast_in_dim(self, node: Node) -> str:
    """Gives the value its new axes with size 1; it is repeated only where an operation does not do so itself."""
    source, shape = node.inputs[0], [1] * len(node.shape)
    before = self.small.get(source, source.shape)
    for axis, size in zip(node.params["broadcast_dimensions"], before, strict=True):
      shape[axis] = size
    self.small[node] = tuple(shape)
    return self._reshaped(self.read(source), before, tuple(shape))

  def _reshape(self, node: Node) -> str:
    return self._reshaped(self.whole(node.inputs[0]), node.inputs[0].shape, node.shape)

  _squeeze = _reshape

  def _reshaped(self, name: str, before: tuple[Any, ...], after: tuple[Any, ...]) -> str:
    if before == after:
      return name
    if len(before) == 4 and before[1:3] != (1, 1):
      name = self.add("Transpose", name, perm=_TO_NHWC)
    sizes = [size if isinstance(size, int) else -1 for size in after]
    direct = len(after) == 4 and after[1:3] == (1, 1)
    name = self.add("Reshape", name, self.integers(_stored(sizes) if direct else sizes))
    return name if direct else self._reordered(name, after)

  def _reordered(self, name: str, shape: tuple[Any, ...]) -> str:
    """A value in JAX's order as it is stored."""
    return self.add("Transpose", name, perm=_TO_NCHW) if len(shape) == 4 else name

  def _slice(self, node: Node) -> str:
    sizes, params = node.inputs[0].shape, node.params
    axes = [axis for axis, size in enumerate(sizes) if isinstance(size, int) and size != node.shape[axis]]
    pick = lambda values: self.integers([values[axis] for axis in axes])
    stored = [_TO_NCHW.index(axis) if len(sizes) == 4 else axis for axis in axes]
    name = self.whole(node.inputs[0])
    steps = params["strides"] or (1,) * len(sizes)
    begin, end = pick(params["start_indices"]), pick(params["limit_indices"])
    return self.add("Slice", name, begin, end, self.integers(stored), pick(steps))

  def _convert_element_type(self, node: Node) -> str:
    return self.add("Cast", self.read(node.inputs[0]), to=helper.np_dtype_to_tensor_dtype(np.dtype(node.dtype)))

  def _select_n(self, node: Node) -> str:
    which, no, yes = map(self.read, node.inputs)
    return self.add("Where", which, yes, no)

  def _integer_pow(self, node: Node) -> str:
    name, power = self.read(node.inputs[0]), node.params["y"]
    if power == 2:
      return self.add("Mul", name, name)
    return self.add("Pow", name, self.number(power))

  def _square(self, node: Node) -> str:
    return self.add("Mul", *[self.read(node.inputs[0])] * 2)

  def _rsqrt(self, node: Node) -> str:
    return self.add("Reciprocal", self.add("Sqrt", self.read(node.inputs[0])))

  def _expm1(self, node: Node) -> str:
    return self.add("Sub", self.add("Exp", self.read(node.inputs[0])), self.number(1))

  def _log1p(self, node: Node) -> str:
    return self.add("Log", self.add("Add", self.read(node.inputs[0]), self.number(1)))

  def _erfc(self, node: Node) -> str:
    return self.add("Sub", self.number(1), self.add("Erf", self.read(node.inputs[0])))

  def _ne(self, node: Node) -> str:
    return self.add("Not", self.add("Equal", *map(self.read, node.inputs)))

  def _clamp(self, node: Node) -> str:
    low, value, high = map(self.read, node.inputs)
    return self.add("Min", self.add("Max", value, low), high)


def _stored(shape: Any) -> list[Any]:
  """The sizes in the order in which a value is stored."""
  return [shape[axis] for axis in _TO_NCHW] if len(shape) == 4 else list(shape)


def _window(node: Node) -> dict[str, Any]:
  """The attributes of a pooling over height and width."""
  pads = node.params["padding"][1:3]
  return {
    "kernel_shape": node.params["window_dimensions"][1:3],
    "strides": node.params["window_strides"][1:3],
    "pads": [low for low, _ in pads] + [high for _, high in pads],
  }
