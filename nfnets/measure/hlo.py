"""Counts from a compiled program's HLO text what its devices send each other."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
  """Holds one instruction of one device's program by which devices exchange data.

  Attributes:
    kind: one of KINDS.
    bytes: of the whole array that a group of devices reduces, gathers or exchanges; for collective-permute, of a device's own.
    devices: number of devices in a group.
    times: how often the program runs the instruction, more than once within a loop.
  """

  kind: str
  bytes: int
  devices: int
  times: int

  @property
  def sent(self) -> float:
    """The bytes that a device sends when groups are rings: an all-reduce goes round twice, everything else once."""
    if self.kind == "collective-permute":
      return float(self.bytes * self.times)
    return (2 if self.kind == "all-reduce" else 1) * (self.devices - 1) / self.devices * self.bytes * self.times


def parse(text: str, devices: int) -> list[Collective]:
  """Finds the collectives of more than one device in an HLO text.

  An asynchronous start and its done count once, the elements of tuples are added up, and computations count as often as they are
  called; a loop counts once where the text does not give its trip count. A fusion of an all-reduce and the slice that a device
  keeps (XLA:TPU's "all-reduce-scatter") is a reduce-scatter.

  Args:
    text: `compiled.as_text()`.
    devices: number of devices of the program, over all of which an instruction without groups runs.
  """
  computations, entry = _computations(text)
  collectives = []
  for name, times in calls(computations, entry).items():
    for line in computations[name]:
      match = _COLLECTIVE.match(line)
      if match is None or match["phase"] == "-done":
        continue
      shape, kind = match["shape"], match["kind"]
      group = _group_size(line, devices)
      parts = elements(shape)
      if match["phase"] == "-start" and kind != "all-reduce" and len(parts) > 1:
        parts = parts[1:2]  # the shape is (operands, results, context …)
      size = sum(map(shape_bytes, parts))
      if kind == "reduce-scatter":
        size *= group
      if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
      if group > 1:
        collectives.append(Collective(kind=kind, bytes=size, devices=group, times=times))
  return collectives


# ---- the patterns


# A shape may hold parentheses and spaces, in tuples and in layouts such as {1,0:T(8,128)}, but no "=" except in comments.
_COLLECTIVE = re.compile(
  r"\s+(?:ROOT )?%?\S+ = (?P<shape>(?:[^=]|index=)+?) "
  rf"(?P<kind>{'|'.join(KINDS)})(?P<phase>-start|-done)?\("
)
HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_CALLED = re.compile(r"\b(?P<how>calls|to_apply|body|condition|true_computation|false_computation)=%?(?P<name>[\w.\-]+)")
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{(?P<names>[^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_CALLS = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computations?)=")
_LEAF = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


# ---- computations and their calls


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Splits the text into (the lines of each computation that can matter here, the name of the entry computation)."""
  computations: dict[str, list[str]] = {}
  entry, lines = "", []
  for line in text.splitlines():
    if line[:1] in (" ", "\t"):
      if "=" in line and (any(kind in line for kind in KINDS) or _CALLS.search(line) or "constant(" in line):
        lines.append(line)
    elif (header := HEADER.match(line)) and not line.startswith("HloModule"):
      lines = computations.setdefault(header["name"], [])
      entry = header["name"] if header["entry"] else entry
  return computations, entry


def calls(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
  """Counts how often each computation runs in one run of the entry."""
  edges = {name: list(_callees(lines, computations)) for name, lines in computations.items()}
  order, seen = [], set()

  def visit(name: str) -> None:
    seen.add(name)
    for callee, _ in edges[name]:
      if callee not in seen:
        visit(callee)
    order.append(name)

  if entry:
    visit(entry)
  times = collections.Counter({entry: 1} if entry else {})
  for name in reversed(order):  # callers come before their callees
    for callee, trips in edges[name]:
      times[callee] += times[name] * trips
  return times


def _callees(lines: list[str], computations: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
  """Yields (computation, times) for each call in `lines`."""
  for line in lines:
    if " async-done(" in line or " async-update(" in line:  # in older texts they repeat their start's call
      continue
    called = {match["how"]: match["name"] for match in _CALLED.finditer(line)}
    for how, name in called.items():
      if name in computations:
        yield name, _trips(line, computations.get(called.get("condition", ""), [])) if how == "body" else 1
    for match in _CALLED_LISTS.finditer(line):
      for name in re.findall(r"[\w.\-]+", match["names"]):
        if name in computations:
          yield name, 1


def _trips(line: str, condition: list[str]) -> int:
  """Returns a loop's trip count: XLA's note of it, else the only constant of the loop's condition, else 1."""
  if noted := _TRIPS.search(line):
    return int(noted[1])
  bounds = [int(bound) for text in condition for bound in re.findall(r"= s32\[\]\S* constant\((\d+)\)", text)]
  return bounds[0] if len(bounds) == 1 else 1


# ---- groups and shapes


def _group_size(line: str, devices: int) -> int:
  """Counts the devices of one group, in each of HLO's notations."""
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):  # mesh['data'=4,'model'=2] {'data'}
    sizes = {axis: int(size) for axis, size in re.findall(r"'([^']*)'=(\d+)", match[1])}
    return math.prod(sizes[axis] for axis in re.findall(r"'([^']*)'", match[2]) if axis in sizes)
  if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):  # [2,4]<=[8]: 2 groups of 4
    return int(match[1])
  if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    return len(match[1].split(","))
  return devices


def elements(shape: str) -> list[str]:
  """Returns the elements of a tuple's shape, or the shape itself."""
  shape = shape.strip()
  if not shape.startswith("("):
    return [shape]
  found, depth, begin = [], 0, 1
  for end, character in enumerate(shape):
    depth += (character in "([{") - (character in ")]}")
    if depth == 0 or depth == 1 and character == ",":
      found.append(shape[begin:end])
      begin = end + 1
  return found


def shape_bytes(shape: str) -> int:
  """Adds up the bytes of all arrays in a shape; tokens and opaque values have none."""
  return sum(
    math.prod(int(size) for size in sizes.split(",") if size) * _item_bits(dtype) // 8 for dtype, sizes in _LEAF.findall(shape)
  )


def _item_bits(dtype: str) -> int:
  """Returns the bits of one number of HLO's `dtype`; 0 for no number."""
  if dtype == "pred":
    return 8
  bits = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
  return int(bits[1]) if bits else 0
