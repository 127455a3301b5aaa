"""Looks at checkpoints, checks them, takes the network out of one:
  python -m launch.checkpoint list DIR
  python -m launch.checkpoint verify DIR
  python -m launch.checkpoint export DIR --out=FILE.safetensors [--weights=params] [--force]

DIR is a workdir or, to verify or export one checkpoint, WORKDIR/checkpoints/STEP.
list: steps, epochs, dates, sizes, metrics, why each is kept, and what counts as no checkpoint.
verify: reads every file and compares it with the manifest, a line for each problem; exit status 1 if there is any.
export: writes the newest good checkpoint's network, the average (EMA) where it was kept, as one safetensors file with our names
(blocks/3/conv1/kernel); its metadata holds the configuration and the versions.
"""

import json
import pathlib
import time
from typing import Any

import rich.table
from absl import flags

from launch import cli
from launch.progress import meter, plain_console
from nfnets.files import write_file
from nfnets.train.checkpoints.errors import CheckpointError, NewerError, NoManifestError


def define(values: flags.FlagValues) -> None:
  flags.DEFINE_string("out", None, "export: the file to write.", flag_values=values)
  flags.DEFINE_enum(
    "weights", None, ["params", "ema"], "export: the parameters or their average; the average if it was kept.", flag_values=values
  )
  flags.DEFINE_boolean("force", False, "export: write over a file that is there.", flag_values=values)


def run(values: flags.FlagValues, *arguments: str) -> int:
  what, *rest = arguments or ("",)
  if what in SUBCOMMANDS:
    if len(rest) != 1:
      raise cli.UsageError(
        f"{what}: expected one directory, got {' '.join(rest) or 'none'}; e.g. python -m launch.checkpoint {what} runs/first"
      )
    if what != "export" and (values.out or values.weights or values.force):
      raise cli.UsageError(f"{what}: --out, --weights and --force are for export")
  return cli.run_subcommand(
    {name: lambda values, program=program: program(values, rest[0]) for name, program in SUBCOMMANDS.items()},
    values,
    (what,) if what else (),
    "python -m launch.checkpoint NAME runs/first",
  )


def show(values: flags.FlagValues, where: str) -> int:
  from nfnets.train.checkpoints import manifest, retention

  kinds: dict[type[CheckpointError], str] = {NoManifestError: "no manifest", NewerError: "of a newer nfnets"}
  directory, steps = _steps(where)
  good, states, problems = {}, {}, []
  for step in steps:
    path = directory / str(step)
    try:
      good[step], wrong = manifest.read(path), manifest.verify(path, hashes=False)
      states[step] = "damaged" if wrong else "good"
    except CheckpointError as error:
      wrong, states[step] = [str(error)], kinds.get(type(error), "damaged")
    problems += [f"{step}: {each}" for each in wrong]
  keep = good[max(good)]["keep"] if good else {"newest": 0}
  kept = retention.kept(good.values(), **keep)
  shown = [*dict.fromkeys(name for name in ("top1", "ema_top1", keep.get("best")) if name)]
  columns = ("step", "epoch", "saved (UTC)", "size", "metrics", "kept", "state")
  table = rich.table.Table(
    *(rich.table.Column(name, no_wrap=name not in ("metrics", "kept")) for name in columns),
    title=str(directory),
    title_justify="left",
  )
  for step in steps:
    one = good.get(step)
    if one is None:
      table.add_row(f"{step:,}", *[""] * 5, states[step])
      continue
    size = sum(file["size"] for file in one["files"].values())
    numbers = [f"{name} {one['metrics'][name]:.4f}" for name in shown if name in (one["metrics"] or {})]
    table.add_row(
      f"{step:,}",
      f"{one['epoch']:.4g}",
      one["saved"][:19].replace("T", " "),
      f"{size / 1e6:,.1f} MB",
      "\n".join(numbers),
      ", ".join(kept.get(step, ["not any more"])),
      states[step],
    )
  plain_console().print(table)
  for problem in problems:
    plain_console().print(problem)
  for path in sorted(path for path in directory.iterdir() if not path.name.isdigit()):
    plain_console().print(
      f"{path.name}: no checkpoint ({'set aside' if path.suffix == '.aside' else 'unfinished or half deleted'})"
    )
  plain_console().print("list looks at names and sizes; verify reads the files")
  return 0


def verify(values: flags.FlagValues, where: str) -> int:
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
  if not values.out:
    raise cli.UsageError("--out is missing: the file to write, e.g. --out=nfnet.safetensors")
  out = pathlib.Path(values.out)
  if not out.parent.is_dir():
    raise cli.UsageError(f"--out={out}: there is no directory {out.parent}")
  if out.is_dir() or out.exists() and not values.force:
    raise cli.UsageError(f"--out={out} is there already; " + ("it is a directory" if out.is_dir() else "--force writes over it"))
  import safetensors.numpy

  from nfnets.train.checkpoints import retention
  from nfnets.train.checkpoints.reader import CheckpointReader

  directory, _ = _steps(where)
  _, one = retention.locate(where)
  reader = CheckpointReader(str(directory))
  step = reader.choose(one)
  if step is None:
    raise cli.UsageError(f"{where}: no checkpoint there; give a workdir that training has written to")
  meta: dict[str, Any] = {**reader.meta(step), "metrics": reader.metrics(step)}
  weights = values.weights or ("ema" if meta["shapes"]["ema"] else "params")
  arrays = reader.restore_weights(step, weights)
  facts = {name: meta[name] for name in ("step", "epoch", "num_classes", "config", "versions", "metrics", "commit")}
  metadata = {
    "format": "nfnets",
    "weights": weights,
    **{name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in facts.items()},
  }
  write_file(out, safetensors.numpy.save(arrays, metadata))
  plain_console().print(
    f"{out}: {weights} of {reader.path(step)}, {len(arrays)} arrays, "
    f"{sum(array.size for array in arrays.values()):,} numbers, {out.stat().st_size:,} bytes"
  )
  return 0


SUBCOMMANDS = {"list": show, "verify": verify, "export": export}


def _steps(where: str) -> tuple[pathlib.Path, list[int]]:
  """(directory of checkpoints, its steps or the one asked for)."""
  from nfnets.train.checkpoints import retention

  cli.check_directory("", where, "a workdir, or WORKDIR/checkpoints/STEP")
  directory, step = retention.locate(where)
  found = retention.steps(directory)
  if not found or step not in (None, *found):
    raise cli.UsageError(f"{where}: no checkpoint there; give a workdir that training has written to")
  return directory, found if step is None else [step]


if __name__ == "__main__":
  cli.main(run, define, __doc__, arguments=True)
