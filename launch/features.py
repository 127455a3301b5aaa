"""Writes features of images: python -m launch.features --weights=SOURCE DATA --out=FILE.npz [--layers=pool,8,16] [--check]

SOURCE is an exported file, a workdir, or WORKDIR/checkpoints/STEP; the network brings its own preprocessing. DATA is the name of
a data set, a folder with train/ or val/ in it, or photographs: files, folders of them, patterns. --layers are the pooled features
and maps at strides (2 to 32). The file holds them with the images' names and, of a data set, their labels; one whose name ends in
.parquet is Parquet, if pyarrow is installed. --check fits k nearest neighbours and a linear classifier on the features of the
training split, and prints their accuracy on the test split. A photograph that cannot be read is one line; the exit status is 1.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any

import rich.console
from absl import flags

from launch import cli
from launch.progress import meter

SPLITS = ("train", "val", "validation", "test")  # folders that make a folder a data set


def define(values: flags.FlagValues) -> None:
  text = lambda name, default, words: flags.DEFINE_string(name, default, words, flag_values=values)
  text("weights", None, "A file of weights, a workdir, or WORKDIR/checkpoints/STEP.")
  text("out", None, "The file to write, .npz or .parquet.")
  text("data_dir", "", "Of the name of a data set: where TFDS has prepared it.")
  text("split", "", "Of a data set: which images; by default test, or val of a folder.")
  text("train_split", "train", "With --check: which images the classifiers are fitted on.")
  flags.DEFINE_boolean("best", False, "Of a workdir, take the best step by the run's own evaluations.", flag_values=values)
  flags.DEFINE_boolean("check", False, "Print the accuracy of k-NN and a linear probe.", flag_values=values)
  flags.DEFINE_list("layers", ["pool"], "pool, and strides of maps.", flag_values=values)
  flags.DEFINE_integer("resolution", None, "Side of the images, pixels.", lower_bound=1, flag_values=values)
  flags.DEFINE_enum("crop", None, ["none", "squash", "crop", "short_side"], "As config.data.test_crop.", flag_values=values)
  flags.DEFINE_integer("batch", 64, "Images at once, over all devices.", lower_bound=1, flag_values=values)


def run(values: flags.FlagValues, *arguments: str) -> int:
  if not values.weights:
    raise cli.UsageError("--weights is missing: a file of weights, a workdir, or WORKDIR/checkpoints/STEP")
  if not arguments:
    raise cli.UsageError("no images; expected the name of a data set, a folder, or photographs")
  if not values.out and not values.check:
    raise cli.UsageError("--out is missing: a file for the features, e.g. --out=features.npz; or --check")
  if values.out and not pathlib.Path(values.out).parent.is_dir():
    raise cli.UsageError(f"--out={values.out}: there is no directory {pathlib.Path(values.out).parent}")
  from nfnets.evaluation import protocol
  from nfnets.train.initial import read_weights

  stored = read_weights(values.weights, best=values.best)
  overrides = protocol.Overrides(resolution=values.resolution, crop=values.crop)
  if len(arguments) == 1 and _is_data_set(arguments[0]):
    images = protocol.images_of(arguments[0], directory=values.data_dir, split=values.split)
    return of_data_set(values, stored, protocol.data_config(stored, images, overrides))
  if values.check or values.split or values.data_dir:
    raise cli.UsageError("--check, --split and --data_dir are for a data set: its name, or a folder with train/ or val/ in it")
  return of_photos(values, stored, protocol.data_config(stored, None, overrides), arguments)


def _is_data_set(name: str) -> bool:
  """Whether it is a folder with a folder for a split, or a name that nothing on the disk has."""
  if os.path.isdir(name):
    return any(os.path.isdir(os.path.join(name, split)) for split in SPLITS)
  return not os.path.lexists(name) and not any(char in name for char in "*?[.")


def of_data_set(values: flags.FlagValues, stored: Any, data: Any) -> int:
  """Writes, or checks, the features of a split."""
  from nfnets.evaluation import features

  outputs, names, classes = _split(values, stored, data, data.test_split)
  if values.out:
    facts = {"image": features.names_of(names), "label": outputs.labels, "class": features.names_of(classes)}
    _write(values.out, outputs.values, facts)
  if values.check:
    train, _, _ = _split(values, stored, data, values.train_split)
    result = {
      layer: features.check(train.values[layer], train.labels, rows, outputs.labels) for layer, rows in outputs.values.items()
    }
    for layer, accuracy in result.items():
      print(f"{layer}: k-NN {accuracy['knn']:.2%}, linear probe {accuracy['linear']:.2%} of {len(outputs.labels):,} images")
    print(json.dumps({"check": result, "train": len(train.labels), "test": len(outputs.labels)}))
  return 0


def _split(values: flags.FlagValues, stored: Any, data: Any, split: str) -> tuple[Any, list[str], list[str]]:
  """The features of a split's images, the images' addresses, and the names of their classes."""
  from nfnets.data.batches.evaluation import EvalBatches
  from nfnets.data.sources.open import open_source
  from nfnets.evaluation import features
  from nfnets.evaluation.outputs import run_split
  from nfnets.weights import network

  net = network.build(stored)
  read = features.reader(net, values.layers)
  with contextlib.closing(open_source(data, split, progress=print)) as source:
    with contextlib.closing(EvalBatches(source, data, batch=1, say=lambda line: None)) as batches:
      features.check_size(net, read, (batches.size, batches.size, 3), len(source))
    with meter(_errors(), f"features of {split}", len(source), "images") as progress:
      outputs = run_split(net, source, data, read, batch=values.batch, progress=progress.set)
    names = [source.address(index) for index in outputs.index.tolist()]
    return outputs, names, [source.class_names[label] for label in outputs.labels]


def of_photos(values: flags.FlagValues, stored: Any, data: Any, arguments: tuple[str, ...]) -> int:
  """Writes the features of photographs; returns 1 if any of them cannot be read."""
  import numpy as np

  from nfnets.evaluation import features
  from nfnets.predict.files import find_photos
  from nfnets.predict.load import classifier_of
  from nfnets.predict.stream import run_photos

  classifier = dataclasses.replace(classifier_of(stored), preprocessing=data)
  read = features.reader(classifier.network, values.layers)
  photos = find_photos(arguments, data.formats)
  rows, names, console, sized = [], [], _errors(), False
  with meter(console, "features", len(photos), "images") as progress:
    for result in run_photos(classifier, photos, read, batch=values.batch):
      if result.values is None or result.pixels is None:
        console.print(result.error)
      else:
        if not sized:
          features.check_size(classifier.network, read, result.pixels.shape, len(photos))
          sized = True
        rows.append(result.values)
        names.append(photos[result.place])
      progress.advance(1)
  if not rows:
    raise cli.UsageError(f"none of the {len(photos):,} images can be read")
  _write(values.out, {layer: np.stack([row[layer] for row in rows]) for layer in rows[0]}, {"image": features.names_of(names)})
  return 1 if len(rows) < len(photos) else 0


def _write(out: str, layers: dict[str, Any], facts: dict[str, Any]) -> None:
  from nfnets.evaluation import features

  path = pathlib.Path(out)
  features.write(path, layers, facts)
  shapes = ", ".join(f"{name} {list(rows.shape)}" for name, rows in layers.items())
  print(f"{path}: {shapes}, {path.stat().st_size:,} bytes")


def _errors() -> rich.console.Console:
  return rich.console.Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
  cli.main(run, define, __doc__, arguments=True)
