"""What every program does when it starts and ends: it reads flags, answers mistakes in one line, and returns an exit status.

The exit status is 0 for done, 1 for failed, 2 for a mistake in what was asked for, 75 for stopped by a signal after saving, and
76 for stuck or for the loss of another process. 75 and 76 ask for the same command to be run again, and so does death by a
signal (above 128): launch/pods/ runs it again after these, never after 1 and 2. In a run of several processes, one that ends
with 1 or 2 ends the others with its status.
"""

import contextlib
import difflib
import gc
import json
import os
import pathlib
import select
import sys
import traceback
from collections.abc import Callable, Mapping

from absl import flags

from launch import recipe
from nfnets import distributed
from nfnets.distributed.errors import LostPeer
from nfnets.distributed.signals import INTERRUPTED, prompt_interrupts
from nfnets.errors import UserError
from nfnets.train.checkpoints import retention
from nfnets.train.checkpoints.errors import SaveError


class UsageError(UserError):
  """The command line asks for something that is impossible."""


def define_processes(values: flags.FlagValues) -> None:
  """Adds the flags that tell a process of the others in its run; where JAX recognises the cluster engine, none is needed."""
  flags.DEFINE_string("coordinator", None, "HOST:PORT at which process 0 waits for the others.", flag_values=values)
  flags.DEFINE_integer("processes", None, "How many processes run this same command.", flag_values=values)
  flags.DEFINE_integer("process", None, "Which of them this is, from 0.", flag_values=values)
  flags.DEFINE_float(
    "start_timeout",
    distributed.TIMEOUT_S,
    "Seconds in which all processes must have joined.",
    lower_bound=0.1,
    flag_values=values,
  )


def start_processes(values: flags.FlagValues) -> distributed.Processes:
  """Joins the other processes. It comes before the configuration is read, so that a mistake in that ends all of them alike."""
  return distributed.start(
    coordinator=values.coordinator, count=values.processes, index=values.process, timeout_s=values.start_timeout
  )


def parse_workdir(values: flags.FlagValues) -> str:
  """Returns `--workdir` and makes the directory if it is not there. Raises UserError where that is impossible."""
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
  """Parses sys.argv, runs a program, and exits with its status.

  A person's mistake ends it with one line and status 2; a bug keeps its traceback.

  Args:
    program: is called with the values of the flags and, with `arguments`, with what is no flag; returns the status, None for 0.
    define: adds the program's flags to these values.
    usage: the beginning of what `--help` prints.
    arguments: whether the program takes arguments that are no flags.
  """
  # A trace makes millions of objects that stay, and a quarter of its time went into looking for garbage among them.
  gc.set_threshold(50_000, 20, 100)
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
      print(f"{usage}\n\n{values.get_help()}{recipe.help_text(values)}", flush=True)
      sys.exit(0)
    if len(rest) > 1 and not arguments:
      raise UsageError(f"unexpected argument {rest[1]!r}; flags look like --name=value")
    with prompt_interrupts():
      status = program(values, *rest[1:])
      if sys.stdout is not None:  # it is None where the output is closed from the start
        sys.stdout.flush()
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
    if isinstance(error, BrokenPipeError) and _reader_has_gone():
      distributed.fail(error, 1, "")  # the other processes end too
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still holds
      sys.exit(1)
    _fail_with_traceback(error)
    raise
  sys.exit(status or 0)


def run_subcommand(
  table: Mapping[str, Callable[..., int]], values: flags.FlagValues, arguments: tuple[str, ...], example: str
) -> int:
  """Runs the subcommand that the first argument names, and returns its status.

  Args:
    table: the subcommands by name.
    values: the flags.
    arguments: what the command line has beside flags.
    example: a command line for the message of a mistake, with NAME in the place of the subcommand.
  """
  name, *rest = arguments or ("nothing",)
  if name not in table:
    near = difflib.get_close_matches(name, table, n=1) or list(table)
    raise UsageError(f"subcommand: got {name}, expected {' or '.join(near)}; e.g. {example.replace('NAME', near[0])}")
  if rest:
    raise UsageError(f"unexpected argument {rest[0]!r}; flags look like --name=value")
  return table[name](values)


def writable(flag: str, name: str | None) -> pathlib.Path | None:
  """Returns the file that a flag names, None without one. Raises UserError if it cannot be written, before minutes are spent."""
  if name is None:
    return None
  file = pathlib.Path(name)
  try:
    with file.open("a", encoding="utf-8"):
      return file
  except OSError as error:
    raise UsageError(f"--{flag}={name}: {error.strerror}") from error


def hand_out(report: dict, file: pathlib.Path | None) -> None:
  """Prints the report as one line of JSON, which is the last line of output, and writes it to the file where there is one."""
  line = json.dumps(report)
  print(line)
  if file is not None:
    file.write_text(f"{line}\n", encoding="utf-8")


def fail(error: object, status: int) -> None:
  """Writes one line to stderr, with the process's number where there are several, and exits."""
  text = f"{distributed.label()}error: {error}\n"
  distributed.fail(error, status, text)
  sys.stderr.write(text)
  sys.exit(status)


def _reader_has_gone() -> bool:
  """Whether nobody reads the output any more, as after `… | head`."""
  poll = select.poll()
  try:
    poll.register(sys.stdout, 0)
  except (TypeError, ValueError, OSError):  # it has no file descriptor
    return False
  return any(event & select.POLLERR for _, event in poll.poll(0))


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
  """Ends a run of several processes and writes the traceback with this process's number; does nothing in a run of one."""
  lines = "".join(traceback.format_exception(error)).splitlines()
  distributed.fail(error, 1, "".join(f"{distributed.label()}{line}\n" for line in lines))
