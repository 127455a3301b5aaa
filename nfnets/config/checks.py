"""Rules for the fields of a configuration: one table a section says what each field accepts, and in which words.

A rule is a function of the value: it returns "" for one that it accepts, else the words for what was expected. No rule accepts
NaN.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from nfnets.errors import UserError

Rule = Callable[[Any], str]


def validate(section: Any, rules: Mapping[str, Rule]) -> None:
  """Checks every field of a section (a dataclass) by its rule.

  Raises:
    UserError: a field has a value that its rule does not accept; the message names field, value and expectation.
  """
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    if expected := rules[field.name](value):
      raise refused(section, field.name, value, expected)


def refused(section: Any, field: str, value: object, expected: str) -> UserError:
  """The error for a field's value."""
  return UserError(f"{type(section).__name__}.{field} = {value!r}: expected {expected}{'' if expected.endswith('?') else '.'}")


# ---- rules


def choice(*values: str) -> Rule:
  """One of some names; the nearest one is suggested."""

  def rule(value: Any) -> str:
    if value in values:
      return ""
    near = difflib.get_close_matches(str(value).lower(), values, n=1, cutoff=0.5)
    return f"one of {', '.join(map(repr, values))}" + (f". Did you mean {near[0]!r}?" if near else "")

  return rule


def names(*values: str) -> Rule:
  """A tuple, not empty, of some names."""
  fits = lambda chosen: isinstance(chosen, tuple | list) and len(chosen) > 0 and all(name in values for name in chosen)
  return lambda chosen: "" if fits(chosen) else f"a tuple of one or more of {', '.join(map(repr, values))}"


def number(expected: str, accepts: Callable[[float], bool]) -> Rule:
  """A number, whole or not, for which `accepts` is true; NaN fails every comparison, so it never is."""
  return lambda value: "" if _is_number(value) and accepts(value) else expected


def positive(expected: str = "a finite number > 0") -> Rule:
  return number(expected, lambda value: 0 < value < math.inf)


def not_negative(expected: str = "a finite number >= 0") -> Rule:
  return number(expected, lambda value: 0 <= value < math.inf)


def share(expected: str = "a number in [0, 1)") -> Rule:
  return number(expected, lambda value: 0 <= value < 1)


def whole(least: int, below: int | None = None) -> Rule:
  """A whole number, at least `least` and below `below` where there is one."""
  expected = f"a whole number >= {least}" if below is None else f"a whole number in [{least}, {below:,})"
  fits = lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value < (below or math.inf)
  return lambda value: "" if fits(value) else expected


def numbers(count: int, expected: str, accepts: Callable[..., bool] = lambda *values: True) -> Rule:
  """A tuple of so many numbers for which `accepts(*values)` is true."""
  fits = lambda values: isinstance(values, tuple | list) and len(values) == count and all(map(_is_number, values))
  return lambda values: "" if fits(values) and accepts(*values) else expected


def flag(value: Any) -> str:
  return "" if isinstance(value, bool) else "True or False"


def name(value: Any) -> str:
  return "" if isinstance(value, str) and value else "a name"


def text(value: Any) -> str:
  return "" if isinstance(value, str) else "a text, which may be empty"


def mapping(value: Any) -> str:
  return "" if isinstance(value, dict) and all(isinstance(key, str) for key in value) else "a mapping from names to values"


def patterns(value: Any) -> str:
  """A tuple of regular expressions."""
  if not isinstance(value, tuple) or not all(isinstance(pattern, str) for pattern in value):
    return "a tuple of regular expressions, such as ('^head/kernel$',)"
  for pattern in value:
    try:
      re.compile(pattern)
    except re.error as error:
      return f"regular expressions, of which {pattern!r} is none ({error})"
  return ""


def optional(rule: Rule, expected: str = "") -> Rule:
  """None, or what `rule` accepts. expected: words to use instead of the rule's own."""
  return lambda value: "" if value is None else rule(value) and (expected or rule(value))


def section(value: Any) -> str:
  """A section of its own, which checks itself: raises UserError."""
  value.validate()
  return ""


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)
