"""What every program does with `--config=FILE[:ARG]` and the flags that change fields of the configuration in it.

ml_collections reads the flags. What it cannot do is done here: keys of `config.model.overrides`, and messages that a person
understands.
"""

import ast
import dataclasses
import difflib
import itertools
import pathlib
import re
import sys
import traceback
import types
import typing
from typing import Any

from absl import flags
from ml_collections import config_flags

from nfnets.config import Config, text
from nfnets.errors import UserError

OVERRIDES = "config.model.overrides"
RECIPE = 'a Python file with a function get_config(arg="") that returns a nfnets.config.Config'
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}


def define(values: flags.FlagValues) -> None:
  """Adds `--config` and the flags for its fields, such as `--config.optim.base_lr=0.2`, as sys.argv has them."""
  config_flags.DEFINE_config_file(
    "config",
    None,
    "Recipe, e.g. configs/digits.py or configs/cifar10.py:norm=batch; with it, --help lists every field.",
    flag_values=values,
    sys_argv=without_overrides(sys.argv),
  )


def parse(values: flags.FlagValues) -> Config:
  """Returns the recipe's configuration with the changes of the command line, checked. Raises UserError."""
  config = values.config
  if config is None:
    raise UserError("--config is missing, e.g. --config=configs/digits.py")
  if not isinstance(config, Config):
    raise UserError(f"--config: get_config must return a nfnets.config.Config, got {type(config).__name__}")
  if any(map(_is_override, sys.argv)):
    _override_model(config, sys.argv)
  config.validate()
  return config


def help_text(values: flags.FlagValues) -> str:
  """Returns a table of all fields of `--config`, with their comments, defaults and values; "" for programs without that flag."""
  if "config" not in values:
    return ""
  if not isinstance(values.config, Config):
    return "\n\n--help with --config=FILE also lists every field that --config.FIELD=VALUE can change.\n"
  return f"\n\nFields of the configuration; --config.FIELD=VALUE changes one.\n\n{text.table(parse(values))}\n"


# ---- keys of config.model.overrides, which ml_collections refuses


def without_overrides(arguments: list[str]) -> list[str]:
  """Returns the command line without `--config.model.overrides…`, which `parse` reads itself."""
  return [argument for argument in arguments if not _is_override(argument)]


def _is_override(argument: str) -> bool:
  return re.match(rf"--?{re.escape(OVERRIDES)}([.=]|$)", argument) is not None


def _override_model(config: Config, arguments: list[str]) -> None:
  """Sets `--config.model.overrides.FIELD=VALUE`, for any field of the model's variant, and `--config.model.overrides={…}`.

  Raises:
    UserError: the variant has no such field, or the field cannot have this value.
  """
  from nfnets import models

  for flag, _, written in (argument.lstrip("-").partition("=") for argument in filter(_is_override, arguments)):
    value, field = _literal(written), flag.removeprefix(OVERRIDES).removeprefix(".")
    if not field and not isinstance(value, dict):
      raise UserError(f"--{flag}={written}: expected a mapping, such as --{flag}=\"{{'width': (64, 128)}}\"")
    config.model.overrides = {**config.model.overrides, field: value} if field else value
  fields = sorted(field.name for field in dataclasses.fields(models.variant(config.model.name)))
  for field in config.model.overrides:
    if field not in fields and field != "norm":  # which a normalizer-free ResNet takes, too; `variant` knows
      raise UserError(f"--{OVERRIDES}.{field}: {config.model.name} has no field {field!r}; its fields: {', '.join(fields)}")
  try:
    models.variant(config.model.name, **config.model.all_overrides())
  except UserError as error:
    raise UserError(f"--{OVERRIDES}: {error}") from error


def _literal(written: str) -> Any:
  """Reads a number, tuple, True, true or None as Python does, and everything else as a text."""
  try:
    return ast.literal_eval({"true": "True", "false": "False"}.get(written, written))
  except (SyntaxError, ValueError):
    return written


# ---- mistakes


def check_arguments(arguments: list[str]) -> None:
  """Raises UserError for a recipe that is not there, for fields that no config has, and for flags that lack their value."""
  names = [argument.lstrip("-").partition("=")[0] for argument in arguments if argument.startswith("-")]
  for argument, following in itertools.pairwise([*arguments, ""]):
    if not argument.startswith("-"):
      continue
    flag, equals, value = argument.lstrip("-").partition("=")
    if flag == "config":
      _check_recipe(value if equals else following)
    elif flag.startswith(("config.", "noconfig.")):
      field = _field(flag.removeprefix("no"))
      if "config" not in names:
        raise UserError(f"{argument} changes a field of a recipe, but none is given: --config=FILE is missing")
      if flag.startswith("no") and equals:
        raise UserError(f"{argument}: expected no value; --{flag} alone says false")
      if _is_override(argument) and not equals:
        raise UserError(f"{argument}: expected a value behind an equals sign, {argument}=VALUE")
      if flag.startswith("no") and field is not None and bool not in _kinds(field.type):
        raise UserError(f"{argument}: {flag.removeprefix('no')} is no field that is true or false")


def _check_recipe(value: str) -> None:
  file = pathlib.Path(value.partition(":")[0])
  if file.is_dir():
    raise UserError(f"--config={value}: {file} is a directory, expected {RECIPE}")
  if not file.is_file():
    near = difflib.get_close_matches(str(file), map(str, sorted(pathlib.Path("configs").glob("*.py"))), n=3, cutoff=0.4)
    raise UserError(f"--config={value}: no file {file}; near: {', '.join(near) or 'none in configs/'}")


def _field(flag: str) -> dataclasses.Field | None:
  """Returns the field that a flag "config.optim.base_lr" names, None inside of a mapping. Raises UserError for an unknown one."""
  field, section, fields = None, Config.__name__, {field.name: field for field in dataclasses.fields(Config)}
  for name in flag.split(".")[1:]:
    if not fields:
      return None
    if name not in fields:
      near = difflib.get_close_matches(name, fields, n=3, cutoff=0.4) or sorted(fields)
      raise UserError(f"--{flag}: {section} has no field {name!r}; near: {', '.join(near)}")
    field, kind = fields[name], fields[name].type
    section = getattr(kind, "__name__", "")
    fields = {inner.name: inner for inner in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
  return field


def _kinds(hint: Any) -> tuple[Any, ...]:
  """Returns the types of an annotation, (bool, NoneType) for `bool | None`."""
  return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def mistake_in_flags(error: Exception, arguments: list[str]) -> UserError | None:
  """Returns what to answer where parsing the flags raised `error`; None for a bug of neither the command line nor the recipe.

  absl and ml_collections raise errors of their own out of what `get_config` raised, which is found by its traceback: a
  UserError or a ValueError of the recipe's own is about its argument; any other error there is a bug of the recipe, named with
  file and line.
  """
  recipe = _recipe(arguments)
  raised: BaseException | None = error
  while raised is not None and recipe is not None:
    frames = traceback.extract_tb(raised.__traceback__)
    lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename).resolve() == recipe.resolve()]
    if not lines and (reason := _no_recipe(raised, recipe)):
      return UserError(f"{reason}; expected {RECIPE}")
    if lines and isinstance(raised, UserError):
      return raised
    if lines and pathlib.Path(frames[-1].filename).resolve() != recipe.resolve() and not isinstance(raised, ImportError):
      return None
    if lines:
      kind = "" if type(raised) is ValueError else f"{type(raised).__name__}: "
      return UserError(f"{recipe}, line {lines[-1]}: {kind}{raised}")
    raised = raised.__cause__ or raised.__context__
  if isinstance(error, flags.IllegalFlagValueError):
    return _wrong_value(error)
  return (
    UserError(" ".join(str(error).split())) if isinstance(error, flags.Error | KeyError | AttributeError | TypeError) else None
  )


def _no_recipe(raised: BaseException, recipe: pathlib.Path) -> str:
  """Returns what is wrong with a file that could not be loaded or has no fitting `get_config`; "" where it is something else."""
  if isinstance(raised, AttributeError) and raised.name == "get_config" and isinstance(raised.obj, types.ModuleType):
    return f"--config={recipe}: no get_config in this file"
  if isinstance(raised, TypeError) and str(raised).startswith("get_config() "):
    return f"--config={recipe}: {raised}"
  if isinstance(raised, UnicodeDecodeError) or "cannot contain null bytes" in str(raised):
    return f"--config={recipe}: this file is no text"
  if isinstance(raised, SyntaxError) and raised.filename and pathlib.Path(raised.filename).resolve() == recipe.resolve():
    return f"{recipe}, line {raised.lineno}: {type(raised).__name__}: {raised.msg}"
  return ""


def _wrong_value(error: flags.IllegalFlagValueError) -> UserError:
  """Says in our words what absl says of a field's value, "flag --config.shard=x: Non-boolean argument …"."""
  said = " ".join(str(error).split())
  match = re.match(r"flag --(config\.[\w.]+)=(.*?): ", said)
  field = _field(match[1]) if match else None
  expected = [_EXPECTED[kind] for kind in _kinds(field.type) if kind in _EXPECTED] if field else []
  return UserError(f"--{match[1]}={match[2]}: expected {' or '.join(expected)}" if match and expected else said)


def _recipe(arguments: list[str]) -> pathlib.Path | None:
  """Returns the file that --config names, without its argument."""
  for argument, following in itertools.pairwise([*arguments, ""]):
    flag, equals, value = argument.partition("=")
    if flag in ("-config", "--config"):
      return pathlib.Path((value if equals else following).partition(":")[0])
  return None
