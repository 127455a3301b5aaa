"""Exact evaluation: every image of a split counts once, on any number of devices and with any batch."""

import contextlib
import dataclasses
import math
import operator
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import rich.table
from flax import nnx
from jax.sharding import Mesh

from nfnets import models
from nfnets.config import Config
from nfnets.config.text import from_json
from nfnets.data.batches.evaluation import EvalBatches
from nfnets.data.sources.open import open_source
from nfnets.errors import UserError
from nfnets.train import resolve
from nfnets.train.checkpoints import retention
from nfnets.train.checkpoints.compatibility import check_same_run, class_difference
from nfnets.train.checkpoints.errors import CheckpointError
from nfnets.train.checkpoints.reader import CheckpointReader
from nfnets.train.step import losses, sharding
from nfnets.train.step.state import build_network, split_network
from nfnets.train.step.step import eval_step_over

Weights = dict[str, tuple[nnx.State, nnx.State]]  # name → (params, running statistics)
_LARGEST = 4096  # what any number of a model's row may be in any case
Results = dict[str, dict[str, float | int]]  # name → {"loss", "top1", "top5", "count"}


def evaluate(
  eval_step: Callable,
  mesh: Mesh,
  weights: Weights,
  batches: EvalBatches,
  *,
  progress: Callable[[int], None] = lambda images: None,
  stopping: Callable[[], bool] = lambda: False,
) -> Results | None:
  """Computes loss, top-1 and top-5 (as fractions) over all images of `batches`, for each of the `weights`.

  Images are read and decoded once for all of them; the last batch is padded and masked. Weights that are split among the devices
  are gathered once, at the beginning.

  Args:
    eval_step: as `eval_step_over` gives it.
    mesh: the devices.
    weights: what to evaluate, by name.
    batches: of the split, this process's rows.
    progress: gets the number of images that are done.
    stopping: asked before each batch; where it is True in one process, all end together, one batch later.

  Returns:
    {name: {"loss", "top1", "top5", "count"}}; None where `stopping` ended it.
  """
  names, weights = list(weights), sharding.gather(mesh, weights)
  totals, previous = None, None
  with contextlib.closing(batches.__iter__()) as parts:
    for done, part in enumerate(parts, start=1):
      batch = sharding.put_batch(mesh, {**part, "stop": np.full(len(mesh.local_devices), stopping(), np.int32)})
      sums = {name: eval_step(params, stats, batch) for name, (params, stats) in weights.items()}
      stop = [metrics.pop("stop") for metrics in sums.values()][-1]
      if previous is not None and bool(previous):  # waits for the step before: more than one ahead would only hold its batch
        return None
      totals = sums if totals is None else jax.tree.map(operator.add, totals, sums)
      previous = stop
      progress(min(len(batches.source), done * batches.batch))
  totals = jax.device_get(totals)
  return {name: losses.summarize(totals[name]) for name in names}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
  """A checkpoint's evaluation. title: model, step, split and devices, for people."""

  path: str
  step: int
  title: str
  results: Results


def evaluate_checkpoint(
  config: Config | None,
  checkpoint: str,
  *,
  best: bool = False,
  other_class_names: bool = False,
  say: Callable[[str], None] = print,
) -> Evaluated:
  """Evaluates the parameters of a checkpoint, and their average if it was kept, over config.data's test split.

  Args:
    config: the network must be the checkpoint's; the data may be others. None takes the configuration that the checkpoint was
      trained with.
    checkpoint: a workdir, of which the newest good step is taken, or WORKDIR/checkpoints/STEP.
    best: of a workdir, take the step whose evaluation was the best (`retention.best_step`).
    other_class_names: the data set may call the classes by other names; labels are compared by number alone.
    say: gets a line about whatever takes long or goes wrong.

  Raises:
    CheckpointError: there is no checkpoint, it is damaged, or it holds another network or other classes.
    DataError: the split cannot be read.
  """
  where = pathlib.Path(checkpoint).resolve()
  reader, (_, asked) = CheckpointReader(str(where), say=say), retention.locate(str(where))
  if best:
    asked = retention.best_step(reader.directory, asked)
  step = reader.choose(asked) if asked is None or reader.path(asked).is_dir() else None
  if step is None:
    raise CheckpointError(f"--checkpoint={where}: no checkpoint there; give a workdir that training has written to")
  meta = reader.meta(step)
  config = config or saved_config(meta, str(reader.path(step)))
  check_same_run(meta["config"], config, str(where), only=("model.", "data.mean", "data.std", "loss"))
  data_config, mesh = resolve.data_config(config), sharding.make_mesh()
  with contextlib.ExitStack() as opened:
    data = opened.enter_context(contextlib.closing(open_source(data_config, data_config.test_split, progress=say)))
    if data.num_classes != meta["num_classes"]:
      raise CheckpointError(
        f"config.data.name={config.data.name!r} has {data.num_classes:,} classes, the checkpoint {reader.path(step)} "
        f"{meta['num_classes']:,}; expected the classes that it was trained on"
      )
    difference = class_difference(meta["data"].get("class_names", data.class_names), data.class_names)
    if difference and not other_class_names:
      raise CheckpointError(
        f"config.data.name={config.data.name!r} has other classes than the checkpoint {reader.path(step)}: {difference}; "
        "expected the names that it was trained on, or --other_class_names where the same classes only have other names"
      )
    batches = EvalBatches(
      data,
      data_config,
      batch=sharding.whole_batch(min(config.eval_batch, len(data)), mesh),
      process=(jax.process_index(), jax.process_count()),
      say=say,
    )
    opened.callback(batches.close)
    graph, params, stats = split_network(nnx.eval_shape(lambda: build_network(config.model, data.num_classes)))
    weights = reader.restore_model(step, *sharding.place(mesh, (params, stats)))
    results = evaluate(eval_step_over(config, mesh, graph), mesh, weights, batches)
    assert results is not None  # nothing asks it to stop
  title = (
    f"{config.model.name}, step {step:,}, {config.data.name} {config.data.test_split} split, "
    f"{mesh.size} × {jax.devices()[0].device_kind}"
  )
  return Evaluated(path=str(reader.path(step)), step=step, title=title, results=results)


def saved_config(meta: dict[str, Any], path: str) -> Config:
  """The configuration that a checkpoint was trained with, which anyone may have written: it is no larger than its arrays.

  Args:
    meta: of the checkpoint.
    path: of it, for messages.

  Raises:
    CheckpointError: a field is unknown or has a wrong value, or building the network or its images would take more memory or
      time than the arrays of the checkpoint warrant.
  """
  try:
    config = from_json(meta["config"])
    row = models.variant(config.model.name, **config.model.all_overrides())
    size = resolve.data_config(config).test_image_size or 0
  except UserError as error:
    raise CheckpointError(f"{path}: its configuration cannot be used: {error}; give another one by --config=FILE") from error
  shapes = meta["shapes"]["model"].values()
  most = max(_LARGEST, *(math.prod(shape) for _, shape in shapes))
  numbers = [
    number
    for value in dataclasses.asdict(row).values()
    for number in (value if isinstance(value, tuple) else (value,))
    if isinstance(number, int)
  ]
  if sum(row.depth) > len(shapes) or max(numbers) > most or size > resolve.LARGEST_SIDE:
    raise CheckpointError(
      f"{path}: its configuration cannot be used: {config.model.name} of depth {row.depth} and width {row.width} on images of "
      f"{size} pixels, but it holds {len(shapes)} arrays, none of more than {most:,} numbers; give another one by --config=FILE"
    )
  return config


def results_table(title: str, results: Results) -> rich.table.Table:
  """A row of top-1, top-5, loss and images for each of the weights."""
  table = rich.table.Table(title=title, title_justify="left")
  for column in ("weights", "top-1", "top-5", "loss", "images"):
    table.add_column(column, justify="left" if column == "weights" else "right")
  for name, values in results.items():
    table.add_row(name, f"{values['top1']:.2%}", f"{values['top5']:.2%}", f"{values['loss']:.4f}", f"{values['count']:,}")
  return table
