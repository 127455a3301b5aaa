"""What every program does with its command line: `--config=FILE[:ARG]` with overrides, and mistakes answered in one line.

Exit status: 0 done, 1 failed, 2 a mistake in what was asked for, 75 stopped by a signal after saving, 76 stuck or another process
was lost. 75 and 76 say "run the same command again", and so does death by a signal (above 128): launch/pods/ does it, never on
1 and 2. In a run of several processes one that ends with 1 or 2 takes the others along, with its status.
"""

import contextlib
import dataclasses
import difflib
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags

from nfnets import distributed
from nfnets.config import Config
from nfnets.distributed.errors import LostPeer
from nfnets.distributed.signals import INTERRUPTED, prompt_interrupts
from nfnets.errors import UserError
from nfnets.train.checkpoints import retention
from nfnets.train.checkpoints.errors import SaveError


class UsageError(UserError):
  """The command line asks for something that cannot be."""


def define_config(values: flags.FlagValues) -> None:
  """Adds `--config` and its overrides, `--config.optim.base_lr=0.2`."""
  config_flags.DEFINE_config_file(
    "config", None, "Recipe, e.g. configs/digits.py or configs/cifar10.py:norm=batch", flag_values=values
  )


def define_processes(values: flags.FlagValues) -> None:
  """Adds the flags by which a process of several learns of the others; engines that JAX knows need none."""
  flags.DEFINE_string("coordinator", None, "HOST:PORT at which process 0 listens for the others.", flag_values=values)
  flags.DEFINE_integer("processes", None, "How many processes run this same command.", flag_values=values)
  flags.DEFINE_integer("process", None, "Which of them this is, from 0.", flag_values=values)
  flags.DEFINE_float(
    "start_timeout", distributed.TIMEOUT_S, "Seconds in which all of them must have come.", lower_bound=0.1, flag_values=values
  )


def start_processes(values: flags.FlagValues) -> distributed.Processes:
  """Joins the other processes, before the configuration is looked at: so that a mistake in it ends them all alike."""
  return distributed.start(
    coordinator=values.coordinator, count=values.processes, index=values.process, timeout_s=values.start_timeout
  )


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
  retention.locate(values.workdir)
  try:
    pathlib.Path(values.workdir).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UsageError(f"--workdir={values.workdir}: {error.strerror}") from error
  return values.workdir


def main(
  program: Callable[..., int | None], define: Callable[[flags.FlagValues], None], usage: str, *, arguments: bool = False
) -> None:
  """Parses sys.argv, runs `program(values)` (and, with `arguments`, what is no flag), exits.

  A person's mistake is one line and status 2, a bug keeps its traceback.
  """
  values = flags.FlagValues()
  flags.DEFINE_boolean("help", False, "Show this and exit.", short_name="h", flag_values=values)
  define(values)
  status: int | None = 1
  try:
    if not {"-h", "--help"} & set(sys.argv):
      _check_config_arguments(sys.argv[1:])
    try:
      rest = values(sys.argv)
    except Exception as error:
      mistake = _mistake_in_flags(error, _recipe(sys.argv[1:]))
      if mistake is None:
        raise
      raise mistake from error
    if values.help:
      print(f"{usage}\n\n{values.get_help()}")
      sys.exit(0)
    if len(rest) > 1 and not arguments:
      raise UsageError(f"unexpected argument {rest[1]!r}; flags look like --name=value")
    with prompt_interrupts():
      status = program(values, *rest[1:])
      distributed.shutdown()
  except LostPeer as error:
    fail(error, distributed.LOST)
  except UserError as error:
    fail(error, 2)
  except (FloatingPointError, SaveError) as error:
    fail(error, 1)
  except KeyboardInterrupt:
    _end_interrupted()
  except Exception as error:
    _fail_with_traceback(error)
    raise
  sys.exit(status or 0)


def run_subcommand(
  table: Mapping[str, Callable[..., int]], values: flags.FlagValues, arguments: tuple[str, ...], example: str
) -> int:
  """Runs the one of `table` that the first argument names. `example`: a command line with NAME for it."""
  what, *rest = arguments or ("nothing",)
  if what not in table:
    near = difflib.get_close_matches(what, table, n=1) or list(table)
    raise UsageError(f"what to do: got {what}, expected: {', '.join(near)}; e.g. {example.replace('NAME', near[0])}")
  if rest:
    raise UsageError(f"unexpected argument {rest[0]!r}; flags look like --name=value")
  return table[what](values)


def writable(flag: str, name: str | None) -> pathlib.Path | None:
  """The file that a flag names, found fit to be written before minutes are spent."""
  if name is None:
    return None
  file = pathlib.Path(name)
  try:
    with file.open("a", encoding="utf-8"):
      return file
  except OSError as error:
    raise UsageError(f"--{flag}={name}: {error.strerror}") from error


def hand_out(report: dict, file: pathlib.Path | None) -> None:
  """The report as the last line of output, JSON, and into the file."""
  line = json.dumps(report)
  print(line)
  if file is not None:
    file.write_text(f"{line}\n", encoding="utf-8")


def fail(error: object, status: int) -> None:
  """One line on stderr, with the process's number where there are several, then exit."""
  text = f"{distributed.label()}error: {error}\n"
  distributed.fail(error, status, text)
  sys.stderr.write(text)
  sys.exit(status)


def _end_interrupted() -> None:
  """Ends at once: the interpreter's own end would wait for threads that still compute, and crash where one of them compiles."""
  with contextlib.suppress(OSError):
    sys.stdout.flush()
  text = f"{distributed.label()}error: interrupted\n"
  distributed.fail("interrupted", INTERRUPTED, text)
  with contextlib.suppress(OSError):
    sys.stderr.write(text)
    sys.stderr.flush()
  os._exit(INTERRUPTED)


def _fail_with_traceback(error: Exception) -> None:
  """In a run of several processes: every line with the process's number, and the end of them all. Otherwise nothing."""
  lines = "".join(traceback.format_exception(error)).splitlines()
  distributed.fail(error, 1, "".join(f"{distributed.label()}{line}\n" for line in lines))


def _recipe(arguments: list[str]) -> pathlib.Path | None:
  """The file that --config names, without its argument."""
  for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
    flag, equals, value = argument.partition("=")
    if flag in ("-config", "--config"):
      return pathlib.Path((value if equals else following).partition(":")[0])
  return None


def _mistake_in_flags(error: Exception, recipe: pathlib.Path | None) -> UserError | None:
  """What to answer where parsing the flags raised `error`; None for a bug that is neither the command line's nor the recipe's.

  absl and ml_collections raise errors of their own out of what `get_config` raised, which is found by its traceback: a
  UserError or a ValueError of the recipe's own is about its argument; any other error there is a bug of the recipe, named with
  file and line.
  """
  raised: BaseException | None = error
  while raised is not None and recipe is not None:
    if isinstance(raised, SyntaxError) and raised.filename and pathlib.Path(raised.filename).resolve() == recipe.resolve():
      return UsageError(f"{recipe}, line {raised.lineno}: {type(raised).__name__}: {raised.msg}")
    frames = traceback.extract_tb(raised.__traceback__)
    lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename).resolve() == recipe.resolve()]
    if lines and isinstance(raised, UserError):
      return raised
    if lines and pathlib.Path(frames[-1].filename).resolve() != recipe.resolve() and not isinstance(raised, ImportError):
      return None
    if lines:
      kind = "" if type(raised) is ValueError else f"{type(raised).__name__}: "
      return UsageError(f"{recipe}, line {lines[-1]}: {kind}{raised}")
    raised = raised.__cause__ or raised.__context__
  known = (flags.Error, KeyError, AttributeError, TypeError)
  return UsageError(" ".join(str(error).split())) if isinstance(error, known) else None


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


def _check_field(kind: Any, names: list[str], flag: str) -> None:
  fields = {field.name: field for field in dataclasses.fields(kind)}
  if names[0] not in fields:
    near = difflib.get_close_matches(names[0], fields, n=3, cutoff=0.4) or sorted(fields)
    raise UsageError(f"--{flag}: {kind.__name__} has no field {names[0]!r}; near: {', '.join(near)}")
  inner = fields[names[0]].type
  if len(names) > 1 and dataclasses.is_dataclass(inner):
    _check_field(inner, names[1:], flag)
