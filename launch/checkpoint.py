"""Lists checkpoints, checks them, exports the network of one, or averages those of several:
  python -m launch.checkpoint list DIR
  python -m launch.checkpoint verify DIR
  python -m launch.checkpoint export DIR --out=FILE.safetensors [--weights=params] [--best] [--force]
  python -m launch.checkpoint average A B C --out=FILE.safetensors [--weights=params] [--best] [--force]

DIR is a workdir or, to verify or export one checkpoint, WORKDIR/checkpoints/STEP.
list: prints steps, epochs, dates, sizes, metrics, why each checkpoint is kept, and what does not count as a checkpoint.
verify: reads every file and compares it with the manifest, with a line for each problem; the exit status is 1 if there is any.
export: writes the network of the newest good checkpoint, its average (EMA) where that was kept, as one safetensors file with the
names of nfnets.models (blocks/3/conv1/kernel); its metadata holds the configuration and the versions.
average: writes the mean of the weights of several exports, workdirs or WORKDIR/checkpoints/STEP, which must be the same network
(a model soup, or steps of one run); its metadata name them. It is read like an export.
"""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import rich.table
from absl import flags

from launch import cli
from launch.progress import meter, plain_console
from nfnets.files import write_file
from nfnets.train.checkpoints.errors import CheckpointError, NewerError, NoManifestError


def define(values: flags.FlagValues) -> None:
  flags.DEFINE_string("out", None, "export, average: the file to write.", flag_values=values)
  flags.DEFINE_enum(
    "weights",
    None,
    ["params", "ema"],
    "export, average: the parameters or their average (EMA); by default the average where it was kept.",
    flag_values=values,
  )
  flags.DEFINE_boolean("best", False, "export, average: the best step by the run's own evaluations.", flag_values=values)
  flags.DEFINE_boolean("force", False, "export, average: replace a file that is already there.", flag_values=values)


def run(values: flags.FlagValues, *arguments: str) -> int:
  name, *rest = arguments or ("",)
  if name in SUBCOMMANDS:
    if name != "average" and len(rest) != 1:
      raise cli.UsageError(
        f"{name}: expected one directory, got {' '.join(rest) or 'none'}; e.g. python -m launch.checkpoint {name} runs/first"
      )
    if name not in ("export", "average") and (values.out or values.weights or values.best or values.force):
      raise cli.UsageError(f"{name}: --out, --weights, --best and --force are for export and average")
  return cli.run_subcommand(
    {key: lambda values, program=program: program(values, *rest) for key, program in SUBCOMMANDS.items()},
    values,
    (name,) if name else (),
    "python -m launch.checkpoint NAME runs/first",
  )


def show(values: flags.FlagValues, where: str) -> int:
  """Prints a table of the checkpoints, with their problems and with what does not count as a checkpoint."""
  from nfnets.train.checkpoints import manifest, retention, schema

  names: dict[type[CheckpointError], str] = {NoManifestError: "no manifest", NewerError: "of a newer nfnets"}
  directory, steps = _steps(where)
  good, states, problems = {}, {}, []
  for step in steps:
    path = directory / str(step)
    try:
      good[step], wrong = manifest.read(path), manifest.verify(path, hashes=False)
      states[step] = "damaged" if wrong else "good"
    except CheckpointError as error:
      wrong, states[step] = [str(error)], names.get(type(error), "damaged")
    problems += [f"{step}: {problem}" for problem in wrong]
  console = plain_console()
  console.print(_table(str(directory), good, states))
  for problem in problems:
    console.print(problem)
  for path in sorted(path for path in directory.iterdir() if retention.step_of(path.name) is None):
    console.print(
      f"{schema.shown(path.name)}: no checkpoint ({'set aside' if path.suffix == '.aside' else 'unfinished or half deleted'})"
    )
  console.print("list compares names and sizes only; verify reads the files")
  return 0


def _table(title: str, good: dict[int, dict[str, Any]], states: dict[int, str]) -> rich.table.Table:
  """Makes a table with a row for each step.

  Args:
    title: stands above the table.
    good: the manifests that can be read, by step.
    states: words for the state of every step.
  """
  from nfnets.train.checkpoints import retention

  keep = good[max(good)]["keep"] if good else {"newest": 0}
  kept = retention.kept(good.values(), **{name: keep[name] for name in ("newest", "every", "best") if name in keep})
  metrics = [*dict.fromkeys(name for name in ("top1", "ema_top1", keep.get("best")) if name)]
  columns = ("step", "epoch", "saved (UTC)", "size", "metrics", "kept", "state")
  table = rich.table.Table(
    *(rich.table.Column(name, no_wrap=name not in ("metrics", "kept")) for name in columns), title=title, title_justify="left"
  )
  for step, state in states.items():
    body = good.get(step)
    if body is None:
      table.add_row(f"{step:,}", *[""] * 5, state)
      continue
    size = sum(file["size"] for file in body["files"].values())
    table.add_row(
      f"{step:,}",
      f"{body['epoch']:.4g}",
      body["saved"][:19].replace("T", " "),
      f"{size / 1e6:,.1f} MB",
      "\n".join(f"{name} {body['metrics'][name]:.4f}" for name in metrics if name in (body["metrics"] or {})),
      ", ".join(kept.get(step, ["not any more"])),
      state,
    )
  return table


def verify(values: flags.FlagValues, where: str) -> int:
  """Reads every file of the checkpoints and prints what is wrong with each; returns 1 if anything is."""
  from nfnets.train.checkpoints import manifest

  directory, steps = _steps(where)
  console, paths = plain_console(), [directory / str(step) for step in steps]
  total = sum(file.stat().st_size for path in paths for file in path.rglob("*") if file.is_file())
  began, bad = time.monotonic(), 0
  with meter(console, "verifying", total, "bytes") as progress:
    for path in paths:
      problems = manifest.verify(path, progress.advance)
      bad += bool(problems)
      for problem in problems or ["good"]:
        console.print(f"{path}: {problem}")
  megabytes, seconds = progress.done / 1e6, max(time.monotonic() - began, 1e-9)
  console.print(f"{len(paths)} checkpoints, {bad} bad; {megabytes:,.1f} MB read at {megabytes / seconds:,.0f} MB/s")
  return 1 if bad else 0


def export(values: flags.FlagValues, where: str) -> int:
  """Writes the network of a checkpoint to `--out`."""
  out = _out(values)
  from nfnets.config.text import from_json
  from nfnets.train.checkpoints import retention
  from nfnets.train.checkpoints.reader import CheckpointReader
  from nfnets.weights.stored import Stored

  directory, _ = _steps(where)
  _, asked = retention.locate(where)
  reader = CheckpointReader(str(directory))
  step = reader.choose(retention.best_step(directory, asked) if values.best else asked)
  if step is None:
    raise cli.UsageError(f"{where}: no checkpoint there; give a workdir that training has written to")
  meta: dict[str, Any] = {**reader.meta(step), "metrics": reader.metrics(step)}
  weights = values.weights or ("ema" if meta["shapes"]["ema"] else "params")
  arrays = reader.restore_weights(step, weights)
  stored = Stored(
    source=f"{weights} of {reader.path(step)}",
    arrays=arrays,
    config=from_json(meta["config"]),
    num_classes=meta["num_classes"],
    class_names=tuple(meta["data"].get("class_names", ())),
  )
  facts = {name: meta[name] for name in ("step", "epoch", "versions", "metrics", "commit")}
  _write(out, stored, {"weights": weights, **facts})
  return 0


def average(values: flags.FlagValues, *sources: str) -> int:
  """Writes the average of the weights of several sources to `--out`."""
  if len(sources) < 2:
    raise cli.UsageError(
      f"average: expected two or more of: an export, a workdir, WORKDIR/checkpoints/STEP; got {' '.join(sources) or 'none'}"
    )
  out = _out(values)
  from nfnets.train.checkpoints.compatibility import versions
  from nfnets.train.initial import read_weights
  from nfnets.weights.average import average

  mean = average(read_weights(source, weights=values.weights, best=values.best) for source in sources)
  facts = {"weights": "average", "averaged": [str(source) for source in sources], "versions": versions()}
  _write(out, mean, facts)
  return 0


def _out(values: flags.FlagValues) -> pathlib.Path:
  """Returns the file of `--out`. Raises UsageError where it cannot be written, before anything is read."""
  if not values.out:
    raise cli.UsageError("--out is missing: the file to write, e.g. --out=nfnet.safetensors")
  out = pathlib.Path(values.out)
  if not out.parent.is_dir():
    raise cli.UsageError(f"--out={out}: there is no directory {out.parent}")
  if out.is_dir() or out.exists() and not values.force:
    raise cli.UsageError(f"--out={out} is already there; " + ("it is a directory" if out.is_dir() else "--force replaces it"))
  return out


def _write(out: pathlib.Path, stored: Any, facts: dict[str, Any]) -> None:
  """Writes weights as a safetensors file, and says so. facts: what is known of them beside what all such files say."""
  from nfnets.train import resolve
  from nfnets.weights.stored import as_file, facts_of

  write_file(out, as_file(stored.arrays, {**facts, **facts_of(stored, resolve.preprocessing(stored))}))
  numbers = sum(array.size for array in stored.arrays.values())
  plain_console().print(f"{out}: {stored.source}, {len(stored.arrays)} arrays, {numbers:,} numbers, {out.stat().st_size:,} bytes")


SUBCOMMANDS: dict[str, Callable[..., int]] = {"list": show, "verify": verify, "export": export, "average": average}


def _steps(where: str) -> tuple[pathlib.Path, list[int]]:
  """Returns the directory of checkpoints, and its steps or the one that `where` names. Raises UserError if there is none."""
  from nfnets.train.checkpoints import retention

  cli.check_directory("", where, "a workdir, or WORKDIR/checkpoints/STEP")
  directory, step = retention.locate(where)
  steps = retention.steps(directory)
  if not steps or step not in (None, *steps):
    raise cli.UsageError(f"{where}: no checkpoint there; give a workdir that training has written to")
  return directory, steps if step is None else [step]


if __name__ == "__main__":
  cli.main(run, define, __doc__, arguments=True)
