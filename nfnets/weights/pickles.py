"""Reads pickles of nested dictionaries of arrays, as Haiku's weights are published, and nothing else.

This is a small machine of its own for pickle's instructions, and not Python's: what an instruction asks for is compared with a
list of names, and no function of that name is ever looked up or called. Dictionaries of arrays of numbers come out. All data
stay views of the file, whose size bounds them together.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from nfnets.weights.errors import WeightsError

INSTRUCTIONS = 1_000_000  # in all; a network of 200 blocks with running statistics has about 150,000
ENTRIES = 100_000  # of all dictionaries together
DEPTH = 10_000  # things that wait on the stack
RANK = 8
_NUMBERS = {f"{kind}{size}" for kind, sizes in {"f": "248", "i": "1248", "u": "1248", "b": "1"}.items() for size in sizes}

# The names that may be asked for, and what each means to this machine. numpy 1 has numpy.core where numpy 2 has numpy._core.
_MEANINGS = {
  ("numpy", "ndarray"): "class of arrays",
  ("numpy", "dtype"): "dtype",
  ("_codecs", "encode"): "bytes",
  ("collections", "OrderedDict"): "dict",
  ("builtins", "dict"): "dict",
  ("haiku._src.data_structures", "FlatMapping"): "dict",
  ("jax._src.array", "_reconstruct_array"): "jax array",
  **{(f"dill.{room}", "_create_array"): "dill array" for room in ("dill", "_dill")},
  **{(f"numpy.{core}.multiarray", "_reconstruct"): "array" for core in ("core", "_core")},
  **{(f"numpy.{core}.multiarray", "scalar"): "scalar" for core in ("core", "_core")},
  **{(f"numpy.{core}.numeric", "_frombuffer"): "frombuffer" for core in ("core", "_core")},
}


@dataclasses.dataclass(slots=True)
class _Name:
  """What one of the names above means."""

  meaning: str


@dataclasses.dataclass(slots=True)
class _DType:
  """A kind of number, such as f4; BUILD gives its byte order."""

  kind: str
  order: str = "<"


@dataclasses.dataclass(slots=True)
class _Array:
  """An array; without a value until BUILD brings one."""

  value: np.ndarray | None = None


class _Mark:
  """Where a run of elements begins on the stack."""


_MARK = _Mark()


def read(data: bytes, source: str) -> dict[str, Any]:
  """Returns the nested dictionaries in a pickle of protocol 2 to 5; their arrays are views of `data`, not to be written to.

  Args:
    data: the pickle.
    source: where it comes from, for messages.

  Raises:
    WeightsError: it is cut off, holds or asks for anything else, or is larger inside than outside.
  """
  try:
    machine = _Machine(data)
    value = machine.run()
    if not isinstance(value, dict):
      raise WeightsError(f"it holds {_kind(value)}, expected a dictionary")
    return _finished(value, [ENTRIES, 2 * len(data)], 0)
  except WeightsError as error:
    raise WeightsError(f"{source} is refused as a pickle of weights, of which nothing was run: {error}") from error


def _kind(value: Any) -> str:
  return type(value).__name__.lstrip("_").lower()


def _shown(name: Any) -> str:
  """The beginning of a name, in letters that can be printed; the kind of what is no name."""
  return ascii(name[:60])[1:-1] if isinstance(name, str) else _kind(name)


def _finished(value: Any, left: list[int], depth: int) -> Any:
  """Puts arrays into the places of `_Array`, in at most four dictionaries one in the other.

  Args:
    value: what the machine made.
    left: how many entries and bytes may still come; a dictionary or an array that stands in many places counts each time.
    depth: dictionaries around it.
  """
  left[0] -= 1
  if isinstance(value, _Array) and value.value is not None:
    left[1] -= value.value.nbytes
    if left[1] < 0:
      raise WeightsError("the same array stands in many places: together they are larger than the file")
    return value.value
  if not isinstance(value, dict):
    raise WeightsError(f"it holds {_kind(value)}, expected arrays and dictionaries of them")
  if depth == 4 or left[0] - len(value) < 0:
    raise WeightsError(f"more than four dictionaries one in the other, or more than {ENTRIES:,} entries")
  return {key: _finished(item, left, depth + 1) for key, item in value.items()}


class _Machine:
  """The stack, the memo and the position of one run."""

  def __init__(self, data: bytes):
    self.data, self.view, self.at = data, memoryview(data), 0
    self.stack: list[Any] = []
    self.memo: dict[int, Any] = {}
    self.spent = 0  # bytes that arrays and copies hold

  def run(self) -> Any:
    """Runs until STOP; raises WeightsError."""
    for _ in range(INSTRUCTIONS):
      code = self.take(1)[0]
      if code == ord("."):
        if len(self.stack) != 1:
          raise WeightsError(f"it ends with {len(self.stack)} values, expected one")
        return self.stack[0]
      action = _ACTIONS.get(code)
      if action is None:
        raise WeightsError(f"instruction {bytes([code])!r} at byte {self.at - 1:,} is none of those that weights need")
      action(self)
      if len(self.stack) > DEPTH:
        raise WeightsError(f"more than {DEPTH:,} values wait on its stack")
    raise WeightsError(f"it has more than {INSTRUCTIONS:,} instructions")

  # ---- the file
  def take(self, count: int) -> memoryview:
    if count > len(self.data) - self.at:
      raise WeightsError(f"it is cut off: {count:,} bytes wanted at byte {self.at:,} of {len(self.data):,}")
    self.at += count
    return self.view[self.at - count : self.at]

  def number(self, size: int, *, signed: bool = False) -> int:
    return int.from_bytes(self.take(size), "little", signed=signed)

  def text(self, size: int) -> str:
    try:
      return str(self.take(size), "utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
      raise WeightsError(f"a text at byte {self.at - size:,} is no UTF-8") from error

  def line(self) -> str:
    end = self.data.find(b"\n", self.at, self.at + 200)
    if end < 0:
      raise WeightsError(f"a name at byte {self.at:,} has no end within 200 bytes")
    self.at, line = end + 1, self.data[self.at : end]
    return line.decode("ascii", "replace")

  # ---- the stack
  def push(self, value: Any) -> None:
    self.stack.append(value)

  def pop(self, kind: Any = object) -> Any:
    if not self.stack or self.stack[-1] is _MARK:
      raise WeightsError(f"an instruction before byte {self.at:,} finds no value")
    value = self.stack.pop()
    if not isinstance(value, kind):
      raise WeightsError(f"an instruction before byte {self.at:,} finds {_kind(value)}")
    return value

  def pop_to_mark(self) -> list[Any]:
    for i in range(len(self.stack) - 1, -1, -1):
      if self.stack[i] is _MARK:
        values = self.stack[i + 1 :]
        del self.stack[i:]
        return values
    raise WeightsError(f"an instruction before byte {self.at:,} finds no mark")

  def tie(self, count: int) -> None:
    values = [self.pop() for _ in range(count)]
    self.push(tuple(reversed(values)))

  def top(self) -> Any:
    self.push(value := self.pop())
    return value

  def set_items(self, items: list[Any]) -> None:
    if len(items) % 2:
      raise WeightsError("a dictionary's entry without a value")
    target = self.pop(dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
      if not isinstance(key, str):
        raise WeightsError(f"a dictionary's key is {_kind(key)}, expected str")
      if key in target:
        raise WeightsError(f"a dictionary has the key {key[:80]!r} twice")
      target[key] = value
    self.push(target)

  def memoize(self, index: int) -> None:
    self.memo[index] = self.top()

  def recall(self, index: int) -> None:
    if index not in self.memo:
      raise WeightsError(f"memo {index} is empty")
    self.push(self.memo[index])

  # ---- names and what they do
  def name(self, module: Any, name: Any) -> None:
    if not (isinstance(module, str) and isinstance(name, str) and (module, name) in _MEANINGS):
      raise WeightsError(f"it asks for {_shown(module)}.{_shown(name)}, which may be code; expected numpy arrays alone")
    self.push(_Name(_MEANINGS[module, name]))

  def reduce(self) -> None:
    arguments, name = self.pop(tuple), self.pop(_Name)
    match name.meaning, arguments:
      case "array", (_Name("class of arrays"), (0,), bytes() | memoryview()):
        self.push(_Array())
      case "dtype", (str(kind), *_) if kind.lstrip("<>=|") in _NUMBERS:
        self.push(_DType(kind.lstrip("<>=|"), ">" if kind.startswith(">") else "<"))
      case "bytes", (str(text), "latin1"):
        self.spend(len(text))
        try:
          self.push(memoryview(text.encode("latin-1")))
        except UnicodeEncodeError as error:
          raise WeightsError("bytes written as a text hold other characters") from error
      case "dict", ():
        self.push({})
      case "dict", (dict(content),):
        self.push(content)
      case "scalar", (_DType() as dtype, memoryview() as buffer):
        self.push(_Array(self.array(buffer, dtype, (), False)))
      case "frombuffer", (memoryview() as buffer, _DType() as dtype, tuple(shape), "C" | "F" as order):
        self.push(_Array(self.array(buffer, dtype, shape, order == "F")))
      case "jax array" | "dill array", (_Name("array"), (_Name("class of arrays"), *_), tuple(state), *_):
        self.push(array := _Array())
        self.set_state(array, state)
      case _:
        raise WeightsError(f"{name.meaning}: made of what it never is made of")

  def build(self) -> None:
    state, target = self.pop(tuple), self.top()
    match target, state:
      case _DType(), (int(), "<" | ">" | "|" | "=" as order, None, None, None, *_):
        target.order = ">" if order == ">" else "<"
      case _Array(), _:
        self.set_state(target, state)
      case _:
        raise WeightsError(f"state for {_kind(target)}, expected arrays and dtypes")

  def set_state(self, array: _Array, state: tuple) -> None:
    match state:
      case (int(), tuple(shape), _DType() as dtype, bool(fortran), memoryview() as buffer) if array.value is None:
        array.value = self.array(buffer, dtype, shape, fortran)
      case _:
        raise WeightsError("an array's state is not numpy's")

  def array(self, buffer: memoryview, dtype: _DType, shape: tuple, fortran: bool) -> np.ndarray:
    """A view of `buffer`; raises WeightsError where it has another size, or all arrays together are larger than the file."""
    if len(shape) > RANK or not all(type(side) is int and side > 0 for side in shape):
      raise WeightsError(f"an array with {len(shape)} sides, expected at most {RANK} positive numbers")
    size = math.prod(shape) * int(dtype.kind[1:])
    if size != len(buffer):
      raise WeightsError(f"an array of {size:,} bytes has {len(buffer):,}")
    self.spend(size)
    array = np.frombuffer(buffer, dtype.order + dtype.kind).reshape(shape, order="F" if fortran else "C")
    return array.astype(array.dtype.newbyteorder("=")) if dtype.order == ">" else array

  def spend(self, size: int) -> None:
    self.spent += size
    if self.spent > 2 * len(self.data):
      raise WeightsError("it uses the same bytes again and again: its arrays are larger than the file")


def _bytes(size_of_size: int) -> Callable[[_Machine], None]:
  return lambda machine: machine.push(machine.take(machine.number(size_of_size)))


def _text(size_of_size: int) -> Callable[[_Machine], None]:
  return lambda machine: machine.push(machine.text(machine.number(size_of_size)))


def _long(machine: _Machine) -> None:
  size = machine.number(1)
  if size > 8:
    raise WeightsError(f"a whole number of {size} bytes, expected at most 8")
  machine.push(machine.number(size, signed=True))


def _stack_name(machine: _Machine) -> None:
  name, module = machine.pop(), machine.pop()
  machine.name(module, name)


def _set_item(machine: _Machine) -> None:
  value, key = machine.pop(), machine.pop()
  machine.set_items([key, value])


_ACTIONS: dict[int, Callable[[_Machine], Any]] = {
  ord(code): action
  for code, action in {
    "\x80": lambda machine: machine.take(1),  # protocol
    "\x95": lambda machine: machine.take(8),  # frame
    "(": lambda machine: machine.push(_MARK),
    "N": lambda machine: machine.push(None),
    "\x88": lambda machine: machine.push(True),
    "\x89": lambda machine: machine.push(False),
    "K": lambda machine: machine.push(machine.number(1)),
    "M": lambda machine: machine.push(machine.number(2)),
    "J": lambda machine: machine.push(machine.number(4, signed=True)),
    "\x8a": _long,
    "G": lambda machine: machine.push(float(np.frombuffer(machine.take(8), ">f8")[0])),
    "U": _bytes(1),
    "T": _bytes(4),
    "C": _bytes(1),
    "B": _bytes(4),
    "\x8e": _bytes(8),
    "\x96": _bytes(8),
    "\x8c": _text(1),
    "X": _text(4),
    "\x8d": _text(8),
    "}": lambda machine: machine.push({}),
    "s": _set_item,
    "u": lambda machine: machine.set_items(machine.pop_to_mark()),
    ")": lambda machine: machine.push(()),
    "t": lambda machine: machine.push(tuple(machine.pop_to_mark())),
    "\x85": lambda machine: machine.tie(1),
    "\x86": lambda machine: machine.tie(2),
    "\x87": lambda machine: machine.tie(3),
    "q": lambda machine: machine.memoize(machine.number(1)),
    "r": lambda machine: machine.memoize(machine.number(4)),
    "\x94": lambda machine: machine.memoize(len(machine.memo)),
    "h": lambda machine: machine.recall(machine.number(1)),
    "j": lambda machine: machine.recall(machine.number(4)),
    "0": lambda machine: machine.pop(),
    "c": lambda machine: machine.name(machine.line(), machine.line()),
    "\x93": _stack_name,
    "R": lambda machine: machine.reduce(),
    "b": lambda machine: machine.build(),
  }.items()
}
