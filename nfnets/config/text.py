"""A configuration as text: what differs from the defaults, every field with its comment, and how it is read back from JSON."""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from nfnets.config.run import Config
from nfnets.errors import UserError


def changes(config: Config) -> str:
  """Returns a line for every field that differs from its default, such as "  config.optim.base_lr = 0.8"."""
  lines = [f"  {name} = {value!r}" for name, default, value, _ in _fields(config) if value != default]
  return "\n".join(["configuration, where it differs from the defaults:", *(lines or ["  nowhere"])])


def table(config: Config, width: int = 80) -> str:
  """Returns every field with its default, its value and, above it, its comment; "*" marks values that differ.

  Args:
    config: where the values come from.
    width: columns; only a value without spaces that is longer breaks out of them.
  """
  name_width, column = 33, (width - 33 - 4) // 2
  lines = [f"{'field':{name_width}}  {'default':{column}}  value", "-" * width]
  for name, default, value, comment in _fields(config):
    if comment:
      lines += ["", *textwrap.wrap(comment, width - 4, initial_indent="  # ", subsequent_indent="  # ")]
    before, now = repr(default), ("* " if value != default else "") + repr(value)
    if len(before) <= column and len(now) <= column:
      lines.append(f"{name:{name_width}}  {before:{column}}  {now}")
    else:
      indented = {"width": width - 2, "initial_indent": " " * 4, "subsequent_indent": " " * 6}
      lines += [name, *textwrap.wrap(f"default {before}", **indented), *textwrap.wrap(f"value {now}", **indented)]
  return "\n".join(lines)


def from_json(saved: dict[str, Any]) -> Config:
  """Makes the configuration that a run wrote into config.json and its checkpoints; fields newer than these get their defaults.

  Raises:
    UserError: a field is unknown or has a value that it does not accept, because another nfnets has written it.
  """
  return _read_section(Config, saved, "config")


def _read_section(kind: type, saved: dict[str, Any], path: str) -> Any:
  types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
  values = {}
  if not isinstance(saved, dict):
    raise UserError(f"{path} = {saved!r:.80}: expected a mapping from fields to values, as a run saves it")
  for name, value in saved.items():
    if name not in types:
      raise UserError(f"{path}.{name} = {value!r} is no field of this nfnets, another one has saved it; expected --config=FILE")
    if dataclasses.is_dataclass(types[name]):
      value = _read_section(types[name], value, f"{path}.{name}")
    values[name] = tuple(value) if isinstance(value, list) else value
  return kind(**values)


def _fields(config: Config) -> Iterator[tuple[str, Any, Any, str]]:
  """Yields (name, default, value, comment) of all fields, those of the run first; a comment that several share stands once."""
  defaults = Config()
  sections = [field.name for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)]
  for prefix, default, section in (
    ("config", defaults, config),
    *((f"config.{name}", getattr(defaults, name), getattr(config, name)) for name in sections),
  ):
    comments = _comments(type(section))
    for field in dataclasses.fields(section):
      if section is not config or field.name not in sections:
        values = getattr(default, field.name), getattr(section, field.name)
        yield f"{prefix}.{field.name}", *values, comments.get(field.name, "")


def _comments(section: type) -> dict[str, str]:
  """Reads the comments of a section's fields, above them or beside them, from its source."""
  comments, above = {}, []
  for line in inspect.getsource(section).splitlines():
    field = re.match(r"  (\w+): [^#]*(?:#\s*(.*))?$", line)
    if field:
      comments[field[1]] = " ".join([*above, *filter(None, [field[2]])])
      above = []
    elif line.startswith("  # "):
      above.append(line.removeprefix("  # "))
    else:
      above = []
  return comments
