"""Says what is on photographs: python -m launch.predict --weights=SOURCE IMAGES…

SOURCE is an exported file, a workdir, or WORKDIR/checkpoints/STEP; the network brings its own preprocessing and names of classes.
IMAGES are files, folders, patterns such as 'photos/**/*.jpg', or - for names on the standard input, one a line. The most probable
classes are printed as a table, CSV (a line for each image and class) or JSON lines. A picture that cannot be read is one line on
the standard error, the others go on, and the exit status is 1. --sheet draws the pictures with what they were taken for.
"""

import csv
import io
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

import rich.console
import rich.markup
import rich.table
from absl import flags

from launch import cli
from launch.progress import meter
from nfnets.data.errors import printable, reason

ON_A_SHEET = 200  # pictures; more take minutes to draw
Top = list[tuple[str, float]]  # classes with their probabilities, the most probable first


def define(values: flags.FlagValues) -> None:
  flags.DEFINE_string("weights", None, "A file of weights, a workdir, or WORKDIR/checkpoints/STEP.", flag_values=values)
  flags.DEFINE_boolean("best", False, "Of a workdir, take the best step by the run's own evaluations.", flag_values=values)
  flags.DEFINE_integer("k", 5, "How many classes of each image are printed.", lower_bound=1, flag_values=values)
  flags.DEFINE_enum("format", "table", ["table", "csv", "jsonl"], "How they are printed.", flag_values=values)
  flags.DEFINE_string("sheet", None, f"A PNG to draw the first {ON_A_SHEET} pictures into.", flag_values=values)
  flags.DEFINE_integer("batch", 64, "Images at once, over all devices.", lower_bound=1, flag_values=values)


def run(values: flags.FlagValues, *arguments: str) -> int:
  if not values.weights:
    raise cli.UsageError("--weights is missing: a file of weights, a workdir, or WORKDIR/checkpoints/STEP")
  if not arguments:
    raise cli.UsageError("no images; expected files, folders, patterns, or - for names on the standard input")
  if values.sheet and not pathlib.Path(values.sheet).parent.is_dir():
    raise cli.UsageError(f"--sheet={values.sheet}: there is no directory {pathlib.Path(values.sheet).parent}")
  from nfnets import predict
  from nfnets.data.tools import inspect
  from nfnets.predict.files import find_photos
  from nfnets.predict.stream import run_photos

  classifier = predict.load(values.weights, best=values.best)
  photos = find_photos(_names(arguments), classifier.preprocessing.formats)
  if not photos:
    raise cli.UsageError("no images: the standard input names none")
  show, finish = PRINTERS[values.format]()
  bad, cells = 0, []
  console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
  with meter(console, "predicting", len(photos), "images") as progress:
    for result in run_photos(classifier, photos, batch=values.batch):
      name = photos[result.place]
      if result.values is None or result.pixels is None:
        bad += 1
        console.print(result.error)
        top: Top = []
      else:
        top = classifier.top_of(result.values["probabilities"], values.k)
        if values.sheet and len(cells) < ON_A_SHEET:
          said = f"{printable(os.path.basename(name))}\n{printable(top[0][0])} {top[0][1]:.0%}"
          cells.append((inspect.cell(result.pixels), said))
      show(name, top, result.error)
      progress.advance(1)
  finish()
  if values.sheet:
    _write_sheet(values.sheet, cells, len(photos))
  if bad:
    console.print(f"{bad:,} of {len(photos):,} images cannot be read")
  return 1 if bad else 0


def _names(arguments: tuple[str, ...]) -> Iterator[str]:
  """The arguments, with the names that the standard input has in the place of "-"."""
  for argument in arguments:
    if argument == "-":
      yield from filter(None, map(os.fsdecode, sys.stdin.buffer.read().splitlines()))
    else:
      yield argument


def _write_sheet(path: str, cells: list, count: int) -> None:
  from nfnets.data.tools import inspect
  from nfnets.files import write_file

  picture = io.BytesIO()
  title = f"{len(cells):,} of {count:,} images" if len(cells) < count else f"{count:,} images"
  inspect.draw(picture, [(title, cells)])
  try:
    write_file(path, picture.getvalue())
  except OSError as error:
    raise cli.UsageError(f"--sheet={path}: cannot be written: {reason(error)}") from error


# ---- formats: what prints an image's classes, and what is done at the end

Printer = tuple[Callable[[str, Top, str], None], Callable[[], None]]


def _as_table() -> Printer:
  table = rich.table.Table("image", "classes")

  def show(name: str, top: Top, error: str) -> None:
    if top:
      classes = ", ".join(f"{printable(label)} {share:.1%}" for label, share in top)
      table.add_row(rich.markup.escape(printable(name)), rich.markup.escape(classes))

  return show, lambda: rich.console.Console().print(table)


def _as_csv() -> Printer:
  writer = csv.writer(sys.stdout, lineterminator="\n")
  writer.writerow(["image", "rank", "class", "probability"])

  def show(name: str, top: Top, error: str) -> None:
    for rank, (label, share) in enumerate(top, start=1):
      writer.writerow([printable(name), rank, printable(label), f"{share:.6f}"])

  return show, sys.stdout.flush


def _as_jsonl() -> Printer:
  def show(name: str, top: Top, error: str) -> None:
    said = {"error": error} if error else {"classes": [{"class": label, "probability": share} for label, share in top]}
    sys.stdout.write(json.dumps({"image": name, **said}) + "\n")

  return show, sys.stdout.flush


PRINTERS: dict[str, Callable[[], Printer]] = {"table": _as_table, "csv": _as_csv, "jsonl": _as_jsonl}


if __name__ == "__main__":
  cli.main(run, define, __doc__, arguments=True)
