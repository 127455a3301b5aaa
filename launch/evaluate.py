"""Evaluates trained networks:
  python -m launch.evaluate --weights=SOURCE[,SOURCE…] [--data=NAME|DIR] [--resolutions=224,256] [--flip] [--out=DIR]
  python -m launch.evaluate --checkpoint=DIR

SOURCE is an exported file, a workdir, or WORKDIR/checkpoints/STEP. Images are shown as the weights say (size, crop, mean, std);
the protocol is printed; --resolution, --crop, --crop_pct, --resize, --mean and --std change a part of it. The images are those of
--data, a folder with train/ or val/ in it or the name of a data set; of a recipe, --config; or those that the first weights
were trained on. It prints accuracy with 95 % confidence intervals, calibration, the published figure where one is known, and
McNemar's test of each against the first; the last line is JSON. --out writes report.json and pictures; --per_image adds a line of
CSV for each image. --real_labels=real.json adds accuracy by ImageNet ReaL's labels; --corruptions=DIR evaluates on ImageNet-C.

--checkpoint compares the parameters of a run with their average (EMA), by the run's own configuration or that of --config.
"""

import contextlib
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import rich.console
from absl import flags

from launch import cli, recipe
from launch.progress import Meter, meter
from nfnets.distributed import Processes

PROTOCOL = {  # field of config.data: flag
  "test_image_size": "resolution",
  "test_crop": "crop",
  "test_crop_pct": "crop_pct",
  "test_resize": "resize",
  "mean": "mean",
  "std": "std",
}


def define(values: flags.FlagValues) -> None:
  recipe.define(values)
  cli.define_processes(values)
  text = lambda name, words: flags.DEFINE_string(name, None, words, flag_values=values)
  flag = lambda name, words: flags.DEFINE_boolean(name, False, words, flag_values=values)
  text("checkpoint", "A workdir, or WORKDIR/checkpoints/STEP: its parameters and their average.")
  flags.DEFINE_list("weights", [], "Files of weights, workdirs or WORKDIR/checkpoints/STEP, to be compared.", flag_values=values)
  flag("best", "Of a workdir, take the best step by the run's own evaluations, not the newest.")
  flag("other_class_names", "The data may name the classes otherwise; labels count.")
  text("data", "A folder with train/ or val/ in it, or the name of a data set.")
  text("data_dir", "Of the name of a data set: where TFDS has prepared it.")
  text("split", "Which images; by default test, val of a folder, or what the recipe says.")
  flags.DEFINE_integer("resolution", None, "Side of the images, pixels.", lower_bound=1, flag_values=values)
  flags.DEFINE_list("resolutions", [], "Several sides, each evaluated.", flag_values=values)
  flags.DEFINE_enum("crop", None, ["none", "squash", "crop", "short_side"], "As config.data.test_crop.", flag_values=values)
  flags.DEFINE_float("crop_pct", None, "As config.data.test_crop_pct.", flag_values=values)
  flags.DEFINE_enum("resize", None, ["tensorflow", "pillow"], "As config.data.test_resize.", flag_values=values)
  flags.DEFINE_list("mean", [], "Three numbers, on the scale 0-255.", flag_values=values)
  flags.DEFINE_list("std", [], "Three numbers, on the scale 0-255.", flag_values=values)
  flag("flip", "Average the logits of each image and of its mirror image.")
  text("classes_map", "names, present, imagenet_a, imagenet_r or a JSON file: which classes of the network the data's are.")
  text("real_labels", "real.json of ImageNet ReaL, or a JSON file of that form: several labels for each image.")
  text("corruptions", "Instead of --data: a folder CORRUPTION/SEVERITY/CLASS, or imagenet2012_corrupted; prints mCE.")
  text("published_as", "Name of the data set whose published figures are shown, e.g. imagenet2012; by default the data's.")
  flags.DEFINE_integer("batch", None, "Images at once, over all devices.", lower_bound=1, flag_values=values)
  text("out", "A directory for report.json and pictures.")
  flag("per_image", "With --out: images.csv, a line for each image.")


def run(values: flags.FlagValues) -> int:
  process = cli.start_processes(values)
  config = None if values.config is None else recipe.parse(values)
  if values.weights and values.checkpoint:
    raise cli.UsageError("--weights and --checkpoint: expected one of them")
  if values.weights:
    return evaluate_weights(values, process)
  if not values.checkpoint:
    raise cli.UsageError("--checkpoint is missing: a workdir, or WORKDIR/checkpoints/STEP; or --weights=SOURCE[,SOURCE…]")
  cli.check_directory("checkpoint", values.checkpoint, "a workdir, or WORKDIR/checkpoints/STEP")
  from nfnets.train.evaluate import evaluate_checkpoint, results_table

  say = print if process.index == 0 else lambda line: None
  evaluated = evaluate_checkpoint(
    config, values.checkpoint, best=values.best, other_class_names=values.other_class_names, say=say
  )
  if process.index == 0:
    rich.console.Console().print(results_table(evaluated.title, evaluated.results))
    print(json.dumps({"checkpoint": evaluated.path, "step": evaluated.step, **evaluated.results}))
  return 0


def evaluate_weights(values: flags.FlagValues, process: Processes) -> int:
  """Evaluates `--weights` at each resolution, and prints and writes what there is to say."""
  sizes, images = _sizes(values), _images(values)
  if values.per_image and not values.out:
    raise cli.UsageError("--per_image writes images.csv, but --out is missing: a directory for it, e.g. --out=report")
  if values.out:
    cli.check_directory("out", values.out, "a directory for the report")
  if values.corruptions:
    return evaluate_corruptions(values, process)
  from nfnets.evaluation import evaluate, report
  from nfnets.train.initial import read_weights

  first, say = process.index == 0, print if process.index == 0 else lambda line: None
  rows = []
  for where in values.weights:
    stored = read_weights(where, best=values.best)
    images = images or stored.config.data  # the same images for all
    for size in sizes:
      rows.append(_evaluate(values, stored, images, size, stored.source, shown=first, say=say))
      say(f"{len(rows)}: {rows[-1].source}, {rows[-1].model}: {rows[-1].protocol}")
  if first:
    dataset = values.published_as or rows[0].data.name
    compared = evaluate.compare_all(rows)
    facts = [report.facts(row, comparison, dataset) for row, comparison in zip(rows, compared, strict=True)]
    title = f"{rows[0].data.name} {rows[0].data.test_split} split, {evaluate.devices()}"
    for table in report.tables(list(zip(rows, facts, strict=True)), title):
      rich.console.Console().print(table)
    if values.out:
      _write(values, rows, facts)
    print(json.dumps({"results": facts}))
  return 0


def evaluate_corruptions(values: flags.FlagValues, process: Processes) -> int:
  """Evaluates `--weights` on every corruption and severity of `--corruptions`; prints a table for each, and writes a picture."""
  from nfnets.evaluation import corruptions, evaluate
  from nfnets.files import write_file
  from nfnets.train.initial import read_weights

  for name in ("data", "config", "resolutions", "real_labels", "per_image"):
    if getattr(values, name):
      raise cli.UsageError(f"--{name} and --corruptions: expected one of them")
  say = print if process.index == 0 else lambda line: None
  parts = corruptions.parts_of(values.corruptions, values.data_dir or "", values.split or "")
  measured, results = [], []
  for number, where in enumerate(values.weights, start=1):
    stored, right, classes = read_weights(where, best=values.best), {}, 0
    for done, ((name, level), images) in enumerate(parts.items(), start=1):
      title = f"{stored.source}: {name} {level} ({done} of {len(parts)})"
      row = _evaluate(values, stored, images, values.resolution, title, shown=process.index == 0)
      right[name, level], classes = (int(row.images.correct.sum()), len(row.images)), len(row.class_names)
      if done == 1:
        say(f"{number}: {row.source}, {row.model}: {row.protocol}")
    result = corruptions.measure(right, classes=classes)
    measured.append((f"{number}: {stored.config.model.name}", result))
    results.append({"weights": stored.source, "model": stored.config.model.name, **corruptions.facts(result)})
  if process.index == 0:
    for title, result in measured:
      rich.console.Console().print(corruptions.table(result, f"{title}, {evaluate.devices()}"))
    if values.out:
      out = pathlib.Path(values.out)
      try:
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / "corruptions.json", json.dumps({"results": results}, indent=1).encode())
        write_file(out / "corruptions.png", corruptions.draw(measured))
      except OSError as error:
        raise cli.UsageError(f"--out={out}: cannot be written: {error.strerror or error}") from error
      print(f"{out}: corruptions.json, corruptions.png")
    print(json.dumps({"results": results}))
  return 0


def _evaluate(
  values: flags.FlagValues,
  stored: Any,
  images: Any,
  size: int | None,
  title: str,
  *,
  shown: bool,
  say: Callable[[str], None] = lambda line: None,
) -> Any:
  """Evaluates weights on some images at one resolution, with a progress bar on the first process."""
  from nfnets.evaluation import evaluate, protocol

  overrides = protocol.Overrides(
    resolution=size,
    crop=values.crop,
    crop_pct=values.crop_pct,
    resize=values.resize,
    mean=_three(values, "mean"),
    std=_three(values, "std"),
    flip=values.flip,
  )
  with _progress(title, shown=shown) as progress:
    return evaluate.evaluate_weights(
      stored,
      images,
      overrides,
      batch=values.batch or (recipe.parse(values).eval_batch if values.config else 256),
      classes_map=values.classes_map or "",
      real_labels=values.real_labels or "",
      other_class_names=values.other_class_names,
      progress=progress,
      say=say,
    )


def _write(values: flags.FlagValues, rows: list, facts: list) -> None:
  """Writes the report of each evaluation: into `--out`, or where there are several into `--out`/1, /2, …"""
  from nfnets.data.sources.open import open_source
  from nfnets.evaluation import report

  for number, (row, fact) in enumerate(zip(rows, facts, strict=True), start=1):
    directory = pathlib.Path(values.out, str(number)) if len(rows) > 1 else pathlib.Path(values.out)
    with contextlib.closing(open_source(row.data, row.data.test_split)) as source:
      names = report.write(directory, row, fact, source, per_image=values.per_image)
    print(f"{directory}: {', '.join(names)}")


def _sizes(values: flags.FlagValues) -> list[int | None]:
  """The resolutions to evaluate at; None is that of the weights."""
  if not values.resolutions:
    return [values.resolution]
  if values.resolution is not None:
    raise cli.UsageError("--resolution and --resolutions: expected one of them")
  if not all(size.isascii() and size.isdigit() and int(size) for size in values.resolutions):
    raise cli.UsageError(f"--resolutions={','.join(values.resolutions)}: expected sides in pixels, e.g. 224,256,288")
  return [int(size) for size in values.resolutions]


def _images(values: flags.FlagValues):
  """Which images `--data` or `--config` name; None for those that the weights were trained on."""
  if values.data is None:
    for name in ("data_dir", "split"):
      if getattr(values, name) is not None and not values.corruptions and (name == "data_dir" or values.config is None):
        raise cli.UsageError(f"--{name} belongs to --data, which is missing: a folder, or the name of a data set")
    if values.config is None:
      return None
    data = recipe.parse(values).data
    for field, name in PROTOCOL.items():
      if any(argument.lstrip("-").startswith(f"config.data.{field}=") for argument in sys.argv):
        raise cli.UsageError(f"--config.data.{field}: the weights say how images are shown; --{name} changes that")
    data.test_split = values.split or data.test_split
    return data
  if values.config is not None:
    raise cli.UsageError("--data and --config: expected one of them to say which images there are")
  from nfnets.evaluation.protocol import images_of

  return images_of(values.data, directory=values.data_dir or "", split=values.split or "")


def _three(values: flags.FlagValues, name: str) -> tuple[float, ...] | None:
  """The numbers of --mean or --std; None without. Their count and range are the configuration's to check."""
  try:
    return tuple(float(number) for number in getattr(values, name)) or None
  except ValueError as error:
    raise cli.UsageError(f"--{name}={','.join(getattr(values, name))}: expected three numbers, e.g. 123.7,116.3,103.5") from error


@contextlib.contextmanager
def _progress(title: str, *, shown: bool):
  """Gives what shows, on the standard error, how many images are done; the first call says of how many, and begins the meter."""
  with contextlib.ExitStack() as opened:
    meters: list[Meter] = []

    def progress(done: int, total: int) -> None:
      if not meters:
        meters.append(opened.enter_context(meter(rich.console.Console(stderr=True), title, total, "images")))
      meters[0].set(done)

    nothing: Callable[[int, int], None] = lambda done, total: None
    yield progress if shown else nothing


if __name__ == "__main__":
  cli.main(run, define, __doc__)
