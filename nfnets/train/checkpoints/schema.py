"""What may stand in the JSON files of a checkpoint, which may come from anyone. Knows no directories of steps, and needs no jax.

Each table names the fields that a file must have, with the rule for each; fields that no table names are a newer version's and
are ignored. What passes can be used without a further look at its types.
"""

import dataclasses
import json
import math
import pathlib
import reprlib
import stat
from typing import Any

from nfnets.config import Config, checks
from nfnets.config.checks import Rule
from nfnets.train.checkpoints.errors import CheckpointError

JSON_BYTES = 64 << 20  # a file of JSON with more is refused; NFNet-F7's with all class names of ImageNet-21k has about 2 MB
_DEPTH = 32  # lists and mappings inside each other; functions that call themselves may go so deep without a thought
STEPS = 2**31  # they are int32
DTYPES = (
  *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
  *("float16", "bfloat16", "float32", "float64"),
)


def read_json(path: pathlib.Path) -> tuple[dict[str, Any], str]:
  """Reads a mapping from a file of JSON; returns it, and the text of the file.

  Raises:
    FileNotFoundError: there is no such file.
    CheckpointError: it cannot be read, is too large, is no JSON or is nested too deeply, or holds no mapping.
  """
  try:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
      raise CheckpointError(f"{path.name} is no file")
    if status.st_size > JSON_BYTES:
      raise CheckpointError(f"{path.name} has {status.st_size:,} bytes, expected at most {JSON_BYTES:,}")
    with open(path, "rb") as file:
      text = file.read(JSON_BYTES).decode()
    body = json.loads(text)
  except (FileNotFoundError, CheckpointError):  # the latter is a ValueError
    raise
  except OSError as error:
    raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
  except RecursionError:
    raise CheckpointError(f"{path.name} is nested too deeply") from None
  except ValueError as error:
    raise CheckpointError(f"{path.name} is damaged: it is no JSON ({error})") from error
  if not isinstance(body, dict):
    raise CheckpointError(f"{path.name} is malformed: expected a mapping from names to values, got a {type(body).__name__}")
  if _is_deep(body):
    raise CheckpointError(f"{path.name} is nested too deeply")
  return body, text


def shown(value: Any) -> str:
  """A value's beginning in letters that can be printed, for messages; a text that can be printed as it is."""
  return value if _words(value) == "" else reprlib.repr(value)


def check(name: str, body: dict[str, Any], table: "Table") -> None:
  """Compares a mapping with a table.

  Args:
    name: of the file, for the message.
    body: what it holds.
    table: MANIFEST or META.

  Raises:
    CheckpointError: a field is missing or has a value that its rule does not accept; the message names it.
  """
  if problem := _problem(body, table, ""):
    raise CheckpointError(f"{name} is malformed: {problem}")


@dataclasses.dataclass(frozen=True)
class Each:
  """A mapping whose names and values all follow the same rule; or None, with `optional`."""

  value: "Rule | Table"
  name: Rule = checks.text
  optional: bool = False


Table = dict[str, "Rule | Table | Each"]  # by field; "?" behind a name: the field may be missing, as an older nfnets wrote none


def _problem(value: Any, rule: Rule | Table | Each, path: str) -> str:
  """What is wrong with a value, "" if nothing is. path: of the value, for the message."""
  if isinstance(rule, Each) and rule.optional and value is None:
    return ""
  if not callable(rule) and not isinstance(value, dict):
    return f"{path}: expected a mapping from names to values, got {reprlib.repr(value)}"
  path = f"{path}." if path else ""
  if isinstance(rule, Each):
    for name, item in value.items():
      if expected := rule.name(name):
        return f"{path}{reprlib.repr(name)}: expected {expected}"
      if problem := _problem(item, rule.value, f"{path}{reprlib.repr(name)}"):
        return problem
  elif isinstance(rule, dict):
    for field, inner in rule.items():
      name = field.removesuffix("?")
      if name in value:
        if problem := _problem(value[name], inner, f"{path}{name}"):
          return problem
      elif field == name:
        return f"{path}{name} is missing"
  elif expected := rule(value):
    return f"{path.removesuffix('.')}: expected {expected}, got {reprlib.repr(value)}"
  return ""


def _is_deep(body: Any) -> bool:
  """Whether lists and mappings lie more than _DEPTH deep in each other."""
  level = [body]
  for _ in range(_DEPTH):
    inner = (value.values() if isinstance(value, dict) else value for value in level)
    level = [value for values in inner for value in values if isinstance(value, dict | list)]
  return bool(level)


# ---- rules: each returns "" for a value that it accepts, else the words for what was expected


def _words(value: Any) -> str:
  """A text that may be printed: no letters that steer a terminal or that no encoding has."""
  return "" if isinstance(value, str) and len(value) <= 1000 and value.isprintable() else "a line of at most 1,000 letters"


def _any_number(value: Any) -> str:
  return "" if isinstance(value, float) or isinstance(value, int) and abs(value) < 2**63 else "a number"


def _path_inside(value: Any) -> str:
  """A relative path that stays in its directory, as the manifest's writer makes them."""
  fits = _words(value) == "" and value and all(part not in ("", ".", "..") for part in value.split("/")) and "\\" not in value
  return "" if fits else "a path inside of the checkpoint"


def _array(value: Any) -> str:
  """Dtype and shape of an array with elements: ["float32", [3, 3, 16, 64]]."""
  fits = isinstance(value, list) and len(value) == 2 and value[0] in DTYPES and isinstance(value[1], list) and len(value[1]) <= 32
  fits = fits and all(isinstance(side, int) and not isinstance(side, bool) and 0 < side < 2**63 for side in value[1])
  return "" if fits and math.prod(value[1]) < 2**59 else 'dtype and shape, such as ["float32", [3, 3, 16, 64]]'


def _list_of(inner: Rule, expected: str) -> Rule:
  return lambda value: "" if isinstance(value, list) and not any(map(inner, value)) else expected


# ---- tables

_STEP = checks.whole(0, STEPS)
_EPOCH = checks.number("a number of epochs", lambda value: 0 <= value < 1e12)
_PERIOD = checks.number("a number of epochs", lambda value: value == 0 or 1e-9 < value < 1e12)
_SIZE = checks.whole(0, 2**63)
_COUNT = checks.whole(1, 2**53)

_SUMMARY: Table = {
  "schema": checks.whole(1, 2**31),
  "step": _STEP,
  "epoch": _EPOCH,
  "keep": {"newest": checks.whole(0, STEPS), "every": _PERIOD, "best": _words},
  "versions": Each(_words, _words),
}
MANIFEST: Table = {
  **_SUMMARY,
  "saved": _words,
  "metrics": Each(_any_number, _words, optional=True),
  "files": Each({"size": checks.whole(0, 2**63), "sha256": _words}, _path_inside),
}
META: Table = {
  **_SUMMARY,
  "previous_step": checks.optional(_STEP),
  "num_classes": checks.whole(1, 2**31),
  "config": {f"{field.name}?": checks.mapping for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)},
  "shapes": {item: Each(_array) for item in ("model", "ema", "training")},
  "data": {
    "records": checks.whole(1, 2**53),
    "next_step": checks.whole(0, 2 * STEPS),
    "order_digest?": _words,
    "class_names?": _list_of(_words, "a list of names"),
    "fingerprint?": _words,
    "corrupt?": _list_of(checks.whole(0, 2**53), "a list of numbers of records"),
  },
  "rng": {"implementation": _words},
  "commit": checks.optional(_words),
}
