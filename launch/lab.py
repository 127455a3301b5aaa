"""Shows why networks train without normalization: published claims as experiments, each with a picture and a verdict.
  python -m launch.lab NAME… [--model=MODEL] [--config=FILE] [--scale=small|full] [--seeds=3] [--out=DIR]
  python -m launch.lab all
  python -m launch.lab list

DIR gets NAME.png, NAME.json, NAME.jsonl (what its parts found, each training for example) and report.html, one file that
opens from disk. An experiment that DIR holds already, of the same settings and the same code, is not computed again, so that
a run that was stopped goes on. --model measures or trains a network of yours beside the purpose-made ones, in every
experiment. It is judged for itself, in a table of its own, and counts for no verdict on a claim but that of nfify, which
judges its twin if it has one. It is a name of nfnets.models, without dropout and stochastic depth, or FILE.py:FUNCTION, where
FUNCTION(seed) returns an nnx.Module that turns images [batch, height, width, 3] into logits. --config takes the images that a
recipe of launch.train names instead of digits, averaged to 16 pixels a side; at the scale small 8 pixels a side, and no more
of them than there are digits where they are counted in epochs, so that it takes no longer.
"""

import difflib
import pathlib
import re
import shlex
import sys
import time

import rich.console
import rich.table
from absl import flags

from launch import cli, compiled, recipe
from launch.progress import LINE_EVERY_S, plain_console


def define(values: flags.FlagValues) -> None:
  compiled.define(values)
  recipe.define(values)
  flags.DEFINE_string("model", None, "A network of your own: a name of nfnets.models, or FILE.py:FUNCTION.", flag_values=values)
  flags.DEFINE_enum(
    "scale", "small", ["small", "full"], "small: at most 3 minutes an experiment on 2 cores; full: for a GPU.", flag_values=values
  )
  flags.DEFINE_integer("seeds", 3, "How often everything is repeated with other weights.", lower_bound=1, flag_values=values)
  flags.DEFINE_string("out", "runs/lab", "A directory for pictures, records and the report.", flag_values=values)
  flags.DEFINE_boolean("again", False, "Compute again what the directory holds already.", flag_values=values)


def run(values: flags.FlagValues, *names: str) -> int:
  from nfnets.lab import experiments

  names = _checked(names, experiments.names())
  if names == ("list",):
    print_list()
    return 0
  cli.check_directory("out", values.out, "a directory for the report")
  out = pathlib.Path(values.out)
  compiled.keep(values)
  from nfnets.lab import runner, task, users
  from nfnets.lab.experiment import Settings

  data = recipe.parse(values).data if values.config is not None else None
  settings = Settings(scale=values.scale, seeds=values.seeds, model=values.model, data=data)
  if settings.model is not None:
    users.labelled_model(settings.model, seed=0, classes=task.classes(data))  # a mistake is told before minutes are spent
  chosen = [experiments.get(name) for name in (experiments.names() if names == ("all",) else names)]
  try:
    out.mkdir(parents=True, exist_ok=True)
    done = runner.run(chosen, settings, out, Teller(), again=values.again, options=shlex.join(_of_config(sys.argv[1:])))
  except OSError as error:
    if not str(error.filename or out).startswith(str(out)):
      raise  # of a file that a person's network reads
    raise cli.UsageError(f"--out={out}: cannot be written: {error.strerror or error}") from error
  print_findings(done)
  print(f"{out / 'report.html'}: open it in a browser")
  return 0


def _of_config(words: list[str]) -> list[str]:
  """Those words of a command line that are --config and its overrides, with their values."""
  found = []
  for word, following in zip(words, [*words[1:], "-"], strict=False):
    name, equals, _ = word.partition("=")
    if re.fullmatch(r"--?config(\..+)?", name):
      found += [word] if equals or following.startswith("-") else [word, following]
  return found


def _checked(names: tuple[str, ...], known: list[str]) -> tuple[str, ...]:
  """The names without repetitions; raises UsageError for one that no experiment has."""
  if not names:
    raise cli.UsageError(f"which experiment? expected {', '.join(known)}, all or list; e.g. python -m launch.lab {known[0]}")
  for name in names:
    if name in ("all", "list") and len(names) > 1:
      raise cli.UsageError(f"{name} stands alone, got {' '.join(names)}")
    if name not in (*known, "all", "list"):
      near = difflib.get_close_matches(name, (*known, "all", "list"), n=1) or [f"{', '.join(known)}, all or list"]
      raise cli.UsageError(f"unknown experiment {name!r}; expected {near[0]}")
  return tuple(dict.fromkeys(names))


def print_list() -> None:
  """Prints a table of the experiments."""
  from nfnets.lab import experiments

  table = rich.table.Table("name", "paper", "claim", "minutes", title="minutes: scale small on 2 cores", show_lines=True)
  for name in experiments.names():
    experiment = experiments.get(name)
    table.add_row(name, f"{experiment.paper}, {experiment.section}", experiment.claim, f"{experiment.minutes:.1f}")
  rich.console.Console().print(table)


class Teller:
  """Prints how far a run is, a line each ten seconds, and each verdict."""

  def __init__(self) -> None:
    self._console, self._last = plain_console(), 0.0

  def __call__(self, step) -> None:
    where = f"{step.name} ({step.number} of {step.count})"
    left = f", about {_duration(step.left_s)} left" if step.left_s >= 1 else ""
    if step.record is not None:
      kept = ", already there" if step.kept else f", {step.record['seconds']:.0f} s"
      self._console.print(f"{where}: {step.record['verdict']}{kept}{left}")
      self._last = 0.0
    elif time.monotonic() - self._last >= LINE_EVERY_S:
      self._last = time.monotonic()
      self._console.print(f"{where}: {step.share:.0%}{left}")


def print_findings(done: list) -> None:
  """Prints every part of every claim with its criterion, the figure measured and the verdict, and the notes."""
  from nfnets.lab import report

  console = plain_console()
  for record in done:
    console.print(f"\n{record['name']}: {record['claim']}\n  {record['verdict'].upper()}")
    for finding in (*record["findings"], *record["yours"]):
      console.print(f"  - {finding['claim']}\n    {finding['criterion']}: {report.figure(finding)}: {finding['verdict']}")
    for note in record["notes"]:
      console.print(f"  {note}")


def _duration(seconds: float) -> str:
  return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
  cli.main(run, define, __doc__, arguments=True)
