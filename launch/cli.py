"""What every program does with its command line: `--config=FILE[:ARG]` with overrides, and mistakes answered in one line.

Exit status: 0 done, 1 failed, 2 a mistake in what was asked for.
"""
import dataclasses
import difflib
import pathlib
import re
import sys
import traceback
from collections.abc import Callable

from absl import flags
from ml_collections import config_flags

import nfnets
from nfnets.config import Config


class UsageError(ValueError):
  """The command line asks for something that cannot be."""


def define_config(values: flags.FlagValues) -> None:
  """Adds `--config` and its overrides, `--config.optim.base_lr=0.2`."""
  config_flags.DEFINE_config_file("config", None, "Recipe, e.g. configs/digits.py or configs/cifar10.py:norm=batch",
                                  flag_values=values)


def parse_config(values: flags.FlagValues) -> Config:
  """The configuration, overridden and checked."""
  if values.config is None:
    raise UsageError("--config is missing, e.g. --config=configs/digits.py")
  if not isinstance(values.config, Config):
    raise UsageError(f"--config: get_config must return a nfnets.config.Config, got {type(values.config).__name__}")
  values.config.validate()
  return values.config


def parse_workdir(values: flags.FlagValues) -> str:
  """`--workdir`, made if it is not there."""
  if not values.workdir:
    raise UsageError("--workdir is missing: a directory for this run, e.g. --workdir=runs/first")
  try:
    pathlib.Path(values.workdir).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UsageError(f"--workdir={values.workdir}: {error.strerror}") from error
  return values.workdir


def main(program: Callable[..., int | None], define: Callable[[flags.FlagValues], None], usage: str, *,
         arguments: bool = False) -> None:
  """Parses sys.argv, runs `program(values)` (and, with `arguments`, what is no flag), exits.

  A person's mistake is one line and status 2, a bug keeps its traceback.
  """
  values = flags.FlagValues()
  flags.DEFINE_boolean("help", False, "Show this and exit.", short_name="h", flag_values=values)
  define(values)
  try:
    if not {"-h", "--help"} & set(sys.argv):
      _check_config_arguments(sys.argv[1:])
    try:
      rest = values(sys.argv)
    except (flags.Error, KeyError, AttributeError, SyntaxError, ImportError, TypeError) as error:
      # a config file's own error comes wrapped in its traceback; the last line is what it said
      raise UsageError(" ".join(re.split(r"\w*Error: ", str(error))[-1].split())) from error
    if values.help:
      print(f"{usage}\n\n{values.get_help()}")
      sys.exit(0)
    if len(rest) > 1 and not arguments:
      raise UsageError(f"unexpected argument {rest[1]!r}; flags look like --name=value")
    status = program(values, *rest[1:])
  except ValueError as error:
    if not _raised_here(error):
      raise
    fail(error, 2)
  except FloatingPointError as error:
    fail(error, 1)
  except KeyboardInterrupt:
    fail("interrupted", 130)
  sys.exit(status or 0)


def run_subcommand(table: dict[str, Callable[[flags.FlagValues], int]], values: flags.FlagValues, arguments: tuple[str, ...],
                   example: str) -> int:
  """Runs the one of `table` that the first argument names. `example`: a command line with NAME for it."""
  what, *rest = arguments or ("nothing",)
  if what not in table:
    near = difflib.get_close_matches(what, table, n=1) or list(table)
    raise UsageError(f"what to do: got {what}, expected: {', '.join(near)}; e.g. {example.replace('NAME', near[0])}")
  if rest:
    raise UsageError(f"unexpected argument {rest[0]!r}; flags look like --name=value")
  return table[what](values)


def fail(error: object, status: int) -> None:
  """One line on stderr, then exit."""
  print(f"error: {error}", file=sys.stderr)
  sys.exit(status)


def _raised_here(error: BaseException) -> bool:
  """Whether our own code raised this, on purpose; what a library raised is a bug of ours."""
  frame = traceback.extract_tb(error.__traceback__)[-1]
  ours = (pathlib.Path(__file__).parent, pathlib.Path(nfnets.__file__).parent, pathlib.Path("configs").resolve())
  return any(path in pathlib.Path(frame.filename).resolve().parents for path in ours)


def _check_config_arguments(arguments: list[str]) -> None:
  """Raises UsageError for a config file that is not there and for overrides of fields that no config has."""
  for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
    flag, equals, value = argument.lstrip("-").partition("=")
    if flag == "config" and argument.startswith("-"):
      value = value if equals else following
      file = pathlib.Path(value.partition(":")[0])
      if not file.is_file():
        near = difflib.get_close_matches(str(file), map(str, sorted(pathlib.Path("configs").glob("*.py"))), n=3, cutoff=0.4)
        raise UsageError(f"--config={value}: no file {file}; near: {', '.join(near) or 'none in configs/'}")
    elif flag.startswith("config.") and argument.startswith("-"):
      _check_field(Config, flag.removeprefix("config.").split("."), flag)


def _check_field(kind: type, names: list[str], flag: str) -> None:
  fields = {field.name: field for field in dataclasses.fields(kind)}
  if names[0] not in fields:
    near = difflib.get_close_matches(names[0], fields, n=3, cutoff=0.4) or sorted(fields)
    raise UsageError(f"--{flag}: {kind.__name__} has no field {names[0]!r}; near: {', '.join(near)}")
  inner = fields[names[0]].type
  if len(names) > 1 and dataclasses.is_dataclass(inner):
    _check_field(inner, names[1:], flag)
