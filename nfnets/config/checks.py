"""What the fields of every configuration are checked with: one clear UserError, naming field, value and expectation."""

import difflib
import re

from nfnets.errors import UserError


def invalid(field: str, value: object, expected: str, kind: str = "OptimConfig") -> UserError:
  return UserError(f"{kind}.{field} = {value!r}: expected {expected}.")


def check_choice(field: str, value: object, choices: tuple[str, ...], kind: str = "OptimConfig") -> None:
  if value in choices:
    return
  near = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.5)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  raise UserError(f"{kind}.{field} = {value!r}: expected one of {', '.join(map(repr, choices))}.{hint}")


def check_number(field: str, value: object, expected: str, accepts, kind: str = "OptimConfig") -> None:
  # NaN fails every comparison, so it never passes `accepts`.
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not accepts(value):
    raise invalid(field, value, expected, kind)


def check_patterns(field: str, value: object) -> None:
  if not isinstance(value, tuple) or not all(isinstance(pattern, str) for pattern in value):
    raise invalid(field, value, "a tuple of regular expressions, such as ('^head/kernel$',)")
  for pattern in value:
    try:
      re.compile(pattern)
    except re.error as error:
      raise invalid(field, pattern, f"a regular expression ({error})") from error
