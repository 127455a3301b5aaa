"""What every program does with its command line and its end: flags in, mistakes answered in one line, exit status out.

Exit status: 0 done, 1 failed, 2 a mistake in what was asked for, 75 stopped by a signal after saving, 76 stuck or another process
was lost. 75 and 76 say "run the same command again", and so does death by a signal (above 128): launch/pods/ does it, never on
1 and 2. In a run of several processes one that ends with 1 or 2 takes the others along, with its status.
"""

import difflib
import json
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping

from absl import flags

from launch import recipe
from nfnets import distributed
from nfnets.distributed.errors import LostPeer
from nfnets.errors import UserError
from nfnets.train.checkpoints import retention
from nfnets.train.checkpoints.errors import SaveError


class UsageError(UserError):
  """The command line asks for something that cannot be."""


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


def parse_workdir(values: flags.FlagValues) -> str:
  """`--workdir`, made if it is not there."""
  if not values.workdir:
    raise UsageError("--workdir is missing: a directory for this run, e.g. --workdir=runs/first")
  check_directory("workdir", values.workdir, "a directory for this run")
  try:
    pathlib.Path(values.workdir).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UsageError(f"--workdir={values.workdir}: {error.strerror}") from error
  return values.workdir


def check_directory(name: str, path: str, expected: str) -> None:
  """Raises UserError where `path`, or a directory that it would lie in, is a file, or where it is a bucket's URL.

  Args:
    name: the flag's, empty for an argument without one.
    path: what was given.
    expected: words for it.
  """
  retention.locate(path)
  for place in (pathlib.Path(path), *pathlib.Path(path).parents):
    if place.is_file():
      raise UsageError(f"{f'--{name}={path}' if name else path}: {place} is a file, expected {expected}")


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
      recipe.check_arguments(sys.argv[1:])
    try:
      rest = values(recipe.without_overrides(sys.argv))
    except Exception as error:
      mistake = recipe.mistake_in_flags(error, sys.argv[1:])
      if mistake is None:
        raise
      raise mistake from error
    if values.help:
      print(f"{usage}\n\n{values.get_help()}{recipe.help_text(values)}")
      sys.exit(0)
    if len(rest) > 1 and not arguments:
      raise UsageError(f"unexpected argument {rest[1]!r}; flags look like --name=value")
    status = program(values, *rest[1:])
    distributed.shutdown()
  except LostPeer as error:
    fail(error, distributed.LOST)
  except UserError as error:
    fail(error, 2)
  except (FloatingPointError, SaveError) as error:
    fail(error, 1)
  except KeyboardInterrupt:
    fail("interrupted", 130)
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


def _fail_with_traceback(error: Exception) -> None:
  """In a run of several processes: every line with the process's number, and the end of them all. Otherwise nothing."""
  lines = "".join(traceback.format_exception(error)).splitlines()
  distributed.fail(error, 1, "".join(f"{distributed.label()}{line}\n" for line in lines))
