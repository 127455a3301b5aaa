"""Lists a compiled program's operations with the memory traffic and the arithmetic of each, and the layer that it comes from."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

import rich.table

from nfnets.measure import hlo

# What moves nothing by itself.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota"}
_CONTROL = {"while", "conditional", "call"}  # what they call is listed instead
_LINE = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>(?:[^=]|index=)+?) (?P<kind>[a-z][\w\-]*)\((?P<rest>.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_LEAF = re.compile(r"\b[a-z]+\d*\w*\[[\d,]*\](?:\{[^}]*\})?")
_LAYER = re.compile(r"\b(stem|blocks/\d+|tail|fc)\b")

Shapes = dict[str, str]  # of a computation's instructions, by name
Computations = dict[str, tuple[dict[str, re.Match], Shapes]]  # by name: the instructions by name, and their shapes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
  """One operation of the program, or a fusion of several.

  Attributes:
    name, kind: as the compiler calls it, such as "fusion.12" and "fusion".
    layer: "stem", "blocks/3", "tail", "fc", with " (backward)" in the backward pass; "step" for what belongs to no layer.
    bytes: what it reads and writes in one run of the program, if every operand is read once, and whole but for `_used`.
    flops: of its convolutions and matrix products, two for a multiply-add; everything else is not counted.
    times: how often the program runs it.
  """

  name: str
  kind: str
  layer: str
  bytes: int
  flops: float
  times: int


def operations(text: str) -> list[Operation]:
  """Lists the operations of an HLO text (`compiled.as_text()`), those with the most traffic first.

  An operand of which a part alone is read is charged whole, so that the sum is above what the compiler's own cost analysis says;
  but of a stack that a loop takes a layer from, or puts one into, that layer alone counts.
  """
  computations, entry = _computations(text)
  times = _times(computations, entry)
  flops = {name: sum(_flops(line, shapes) for line in lines.values()) for name, (lines, shapes) in computations.items()}
  found = []
  for name, count in times.items():
    lines, shapes = computations[name]
    for line in lines.values():
      if line["kind"] in _FREE or line["kind"] in _CONTROL or line["kind"].endswith(("-done", "-update")):
        continue
      size = _moved(line, computations, shapes)
      called = [callee for callee in _callees(line["rest"]) if callee in flops]
      work = _flops(line, shapes) + (sum(flops[callee] for callee in called) if line["kind"] == "fusion" else 0)
      found.append(
        Operation(
          name=line["name"], kind=line["kind"], layer=_layer(line["rest"]), bytes=size * count, flops=work * count, times=count
        )
      )
  return sorted(found, key=lambda operation: -operation.bytes)


def table(found: Iterable[Operation], top: int) -> rich.table.Table:
  """The `top` operations with the most traffic, the layers' sums being in the last rows."""
  rows = list(found)
  total, work = sum(row.bytes for row in rows) or 1, sum(row.flops for row in rows) or 1
  title = f"{len(rows):,} operations move {total / 1e9:,.2f} GB (operands whole) and compute {work / 1e9:,.1f} GFLOP in products"
  result = rich.table.Table("operation", "layer", title=title, title_justify="left")
  for column in ("times", "MB", "share", "GFLOP", "share"):
    result.add_column(column, justify="right")
  cells = lambda size, flops: (f"{size / 1e6:,.1f}", f"{size / total:.1%}", f"{flops / 1e9:,.2f}", f"{flops / work:.1%}")
  for row in rows[:top]:
    result.add_row(row.name[:48], row.layer, f"{row.times:,}", *cells(row.bytes, row.flops))
  result.add_section()
  layers: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
  for row in rows:
    sums = layers[row.layer]
    sums[0], sums[1], sums[2] = sums[0] + row.times, sums[1] + row.bytes, sums[2] + row.flops
  for layer, (count, size, flops) in sorted(layers.items(), key=lambda item: -item[1][1])[:top]:
    result.add_row("all of a layer", layer, f"{count:,}", *cells(size, flops))
  return result


def _moved(line: re.Match, computations: Computations, shapes: Shapes) -> int:
  """Bytes that an operation reads from and writes to the device's main memory; what lies in a faster one, S(1), costs nothing."""
  kind = line["kind"]
  if kind.endswith("-start") and not kind.startswith(hlo.KINDS):
    # A copy ahead of its use has the shape (there, here, …), a slice ahead of its use ((here, …), there, …).
    there, here, *_ = [*hlo.elements(line["shape"]), ""]
    there, here = (there, here) if kind == "copy-start" else (here, here)
    return _main_bytes(there) + (_main_bytes(here) if kind == "copy-start" else hlo.shape_bytes(there))
  called = _callees(line["rest"])[0] if kind == "fusion" else ""
  results = _results(computations[called][0]) if called in computations else [(line["shape"], line)]
  inner = computations[called][1] if called in computations else shapes
  total = sum(_result_bytes(shape, result, inner) for shape, result in results)
  for place, name in enumerate(_operands(line)):
    if name in shapes and _main_bytes(shapes[name]):
      part = _used(line, place, computations)
      total += _main_bytes(shapes[name]) if part is None else part
  return total


def _used(line: re.Match, place: int, computations: Computations, is_result: bool = True) -> int | None:
  """How many bytes of an operand are read where that is a part of it: a layer of a stack; None where it is all of it."""
  if line["kind"] == "dynamic-slice" and place == 0:
    return hlo.shape_bytes(line["shape"])
  if line["kind"] == "dynamic-update-slice" and place == 0 and is_result:
    return 0  # it is changed in place
  called = _callees(line["rest"])[:1] if line["kind"] == "fusion" else []
  if not called or called[0] not in computations:
    return None
  lines = computations[called[0]][0]
  is_parameter = lambda line: line["kind"] == "parameter" and line["rest"].startswith(f"{place})")
  name = next((name for name, line in lines.items() if is_parameter(line)), None)
  results = {result["name"] for _, result in _results(lines)}
  users = [(user, i) for user in lines.values() for i, operand in enumerate(_operands(user)) if operand == name]
  parts = [_used(user, i, computations, user["name"] in results) for user, i in users]
  return None if name is None or None in parts else sum(filter(None, parts))


def _results(lines: dict[str, re.Match]) -> list[tuple[str, re.Match]]:
  """What a computation gives back: the shape, with the memory that it lies in, and the instruction that computes it, of each."""
  root = next((line for line in lines.values() if line.string.lstrip().startswith("ROOT")), None)
  if root is None:
    return []
  found = [lines[name] for name in _operands(root) if name in lines] if root["kind"] == "tuple" else [root]
  return [(line["shape"], _behind_bitcasts(line, lines)) for line in found]


def _behind_bitcasts(line: re.Match, lines: dict[str, re.Match]) -> re.Match:
  while line["kind"] == "bitcast" and _operands(line)[0] in lines:
    line = lines[_operands(line)[0]]
  return line


def _result_bytes(shape: str, line: re.Match, shapes: Shapes) -> int:
  """The bytes of a result of that shape that are written to main memory: of a stack that gets a layer, the layer's."""
  operands = _operands(line)
  if line["kind"] == "dynamic-update-slice" and len(operands) > 1 and _main_bytes(shape):
    return hlo.shape_bytes(shapes.get(operands[1], ""))
  return _main_bytes(shape)


def _main_bytes(shape: str) -> int:
  """The bytes of the arrays in a shape that lie in main memory."""
  return sum(hlo.shape_bytes(leaf) for leaf in _LEAF.findall(shape) if "S(1)" not in leaf)


def _layer(rest: str) -> str:
  """The layer that an operation's name in the traced program says; the last one that is found in it."""
  match = _OP_NAME.search(rest)
  if match is None:
    return "no name (copies made by the compiler)"
  layers = _LAYER.findall(match[1])
  if not layers:
    return "step"
  return f"{layers[-1]} (backward)" if "transpose(" in match[1] else layers[-1]


# ---- the text


def _computations(text: str) -> tuple[Computations, str]:
  """Splits the text: by computation (its instructions by name, their shapes by name); and the name of the entry."""
  computations: Computations = {}
  entry, current = "", ({}, {})
  for line in text.splitlines():
    if line[:1] in (" ", "\t"):
      if match := _LINE.match(line):
        current[0][match["name"]], current[1][match["name"]] = match, match["shape"]
    elif (header := hlo.HEADER.match(line)) and not line.startswith("HloModule"):
      current = computations.setdefault(header["name"], ({}, {}))
      entry = header["name"] if header["entry"] else entry
  return computations, entry


def _times(computations: Computations, entry: str) -> dict[str, int]:
  """How often each computation runs whose operations stand for themselves, those in fusions and reductions left out."""
  kept = {
    name: [line.string for line in lines.values() if line["kind"] in _CONTROL or line["kind"] == "constant"]
    for name, (lines, _) in computations.items()
  }
  return {name: count for name, count in hlo.calls(kept, entry).items() if count}


def _arguments(rest: str) -> str:
  """The operands: what stands before the closing bracket of the instruction."""
  depth = 1
  for end, character in enumerate(rest):
    depth += (character == "(") - (character == ")")
    if depth == 0:
      return rest[:end]
  return rest


def _callees(rest: str) -> list[str]:
  return re.findall(r"\bcalls=%?([\w.\-]+)", rest)


def _operands(line: re.Match) -> list[str]:
  return _OPERAND.findall(_arguments(line["rest"]))


def _flops(line: re.Match, shapes: Shapes) -> float:
  """Twice the multiply-adds of a convolution or a matrix product, padding included; 0 for everything else."""
  if line["kind"] not in ("convolution", "dot"):
    return 0.0
  operands = [shapes.get(name, "") for name in _operands(line)]
  out = math.prod(_sizes(line["shape"]))
  if line["kind"] == "dot":
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line["rest"])
    left = _sizes(operands[0]) if operands else []
    return 2.0 * out * math.prod(left[int(axis)] for axis in axes[1].split(",") if axis) if axes and left else 0.0
  labels = re.search(r"dim_labels=\w+_(\w+)->", line["rest"])
  kernel = _sizes(operands[1]) if len(operands) > 1 else []
  if labels is None or len(kernel) != len(labels[1]):
    return 0.0
  return 2.0 * out * math.prod(kernel) / max(1, kernel[labels[1].index("o")])


def _sizes(shape: str) -> list[int]:
  match = re.search(r"\[([\d,]*)\]", shape)
  return [int(size) for size in match[1].split(",") if size] if match else []
