"""Looks at a dataset, checks it, or makes it smaller:
  python -m launch.data describe --config=configs/nfnet.py:F0 [--config.data.dir=DIR] [--out=grid.png] [--augmented]
  python -m launch.data verify --config=configs/nfnet.py:F0 [--split=train]
  python -m launch.data prepare --config=configs/nfnet.py:F0 --out=DIR [--short_side=256] [--quality=90] [--shards=N]

describe: prints the splits, classes, image sizes and images of each class. --out draws 40 images into a file; with --augmented,
as training sees them too.
verify: reads every record of both splits, compares checksums and decodes the images; the exit status is 1 if any is corrupt.
prepare: writes the splits with smaller images as a TFDS dataset under DIR. Run again, it goes on where it was interrupted.
"""

import contextlib
import functools
import os

import rich.table
from absl import flags

from launch import cli, recipe
from launch.progress import meter, plain_console


def define(values: flags.FlagValues) -> None:
  recipe.define(values)
  flags.DEFINE_string(
    "out", None, "describe: a file to draw pictures into; prepare: the directory to write to.", flag_values=values
  )
  flags.DEFINE_boolean("augmented", False, "describe: also draw the images as training sees them.", flag_values=values)
  flags.DEFINE_string("split", None, "verify: only this split, e.g. train or validation[:100].", flag_values=values)
  flags.DEFINE_integer(
    "short_side", 256, "prepare: pixels of the shorter side; smaller images stay as they are.", lower_bound=1, flag_values=values
  )
  flags.DEFINE_integer("quality", 90, "prepare: quality of the JPEGs.", lower_bound=1, upper_bound=100, flag_values=values)
  flags.DEFINE_integer(
    "shards",
    None,
    "prepare: shards of the training split, instead of one for each 2,048 records.",
    lower_bound=1,
    flag_values=values,
  )


def run(values: flags.FlagValues, *arguments: str) -> int:
  return cli.run_subcommand(SUBCOMMANDS, values, arguments, "python -m launch.data NAME --config=configs/digits.py")


def describe(values: flags.FlagValues) -> int:
  config, console = recipe.parse(values), plain_console()
  say = functools.cache(console.print)  # as in `verify` and `prepare`: both splits of a folder may be taken from the same files
  from nfnets.data.sources.open import open_source
  from nfnets.data.tools import inspect
  from nfnets.train import resolve

  data, out = resolve.data_config(config), values.out
  if values.augmented and not out:
    raise cli.UsageError("--augmented adds to the picture, but --out is missing: a file for it, e.g. --out=grid.png")
  if out and not os.path.isdir(os.path.dirname(out) or "."):  # before minutes are spent
    raise cli.UsageError(f"--out={out}: there is no directory {os.path.dirname(out)}")
  train = open_source(data, data.train_split, progress=say)
  test = open_source(data, data.test_split, progress=say)
  with contextlib.closing(train), contextlib.closing(test):
    splits = inspect.known_splits(data)
    if splits:
      console.print(f"splits of {data.name}: " + ", ".join(f"{name} ({count:,})" for name, count in splits.items()))
    for source in (train, test):
      for line in inspect.summarize(source).lines():
        console.print(line)
    first = ", ".join(train.class_names[:10])
    console.print(f"{train.num_classes:,} classes: {first}{', …' if train.num_classes > 10 else ''}")
    if not out:
      return 0
    grids = [(f"{data.name} {train.split}, as stored", inspect.stored_pictures(train))]
    if values.augmented:
      grids.append(
        (
          f"{data.name} {train.split}, as training sees it (config.seed={config.seed})",
          inspect.training_pictures(train, data, seed=config.seed, say=console.print),
        )
      )
  inspect.draw(out, grids)
  console.print(f"pictures: {out}")
  return 0


def verify(values: flags.FlagValues) -> int:
  config, console = recipe.parse(values), plain_console()
  from nfnets.data.sources.open import open_source
  from nfnets.data.tools import inspect

  say = functools.cache(console.print)
  splits = [values.split] if values.split else [*dict.fromkeys((config.data.train_split, config.data.test_split))]
  checked = []
  for split in splits:
    with contextlib.closing(open_source(config.data, split, progress=say)) as source:
      with meter(console, split, len(source), "records") as progress:
        checked.append(
          inspect.verify(
            source,
            threads=config.data.threads,
            progress=progress.set,
            on_corrupt=lambda error: console.print(f"corrupt: {error}"),
          )
        )
  table = rich.table.Table("split", *(rich.table.Column(name, justify="right") for name in ("records", "corrupt", "bytes")))
  for split in checked:
    table.add_row(split.split, f"{split.records:,}", f"{len(split.corrupt):,}", f"{split.bytes:,}")
  console.print(table)
  return 1 if any(split.corrupt for split in checked) else 0


def prepare(values: flags.FlagValues) -> int:
  config, console = recipe.parse(values), plain_console()
  if not values.out:
    raise cli.UsageError("--out is missing: a directory for the prepared dataset, e.g. --out=data/small")
  from nfnets.data.tools.prepare import Preparation

  say = functools.cache(console.print)
  with contextlib.closing(
    Preparation(config.data, values.out, short_side=values.short_side, quality=values.quality, shards=values.shards, say=say)
  ) as job:
    if job.done:
      console.print(f"{job.done:,} of {job.total:,} records are there already")
    with meter(console, job.name, job.total, "images", job.done) as progress:
      made = job.run(progress.set)
  counts = ", ".join(f"{split} {count:,}" for split, count in made.records.items())
  console.print(
    f"{made.path}: {counts} images, {made.shards} shards ({made.kept} kept), {made.bytes:,} bytes"
    + (f"; {made.lost:,} corrupt records left out" if made.lost else "")
  )
  name = f"--config.data.name={made.name} " if made.name != config.data.name else ""
  console.print(f"use it with: {name}--config.data.dir={values.out}")
  return 0


SUBCOMMANDS = {"describe": describe, "verify": verify, "prepare": prepare}


if __name__ == "__main__":
  cli.main(run, define, __doc__, arguments=True)
