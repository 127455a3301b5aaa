"""Exact evaluation: every image of a split counts once, on any number of devices and with any batch."""

import contextlib
import operator
from collections.abc import Callable

import jax
import numpy as np
import rich.table
from flax import nnx
from jax.sharding import Mesh

from nfnets.data.batches.evaluation import EvalBatches
from nfnets.train.step import losses, sharding

Weights = dict[str, tuple[nnx.State, nnx.State]]  # name → (params, running statistics)
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
  """Loss, top-1 and top-5 (as fractions) over all images of `batches`, for each of the `weights`.

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
  with contextlib.closing(iter(batches)) as parts:
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


def results_table(title: str, results: Results) -> rich.table.Table:
  """A row of top-1, top-5, loss and images for each of the weights."""
  table = rich.table.Table(title=title, title_justify="left")
  for column in ("weights", "top-1", "top-5", "loss", "images"):
    table.add_column(column, justify="left" if column == "weights" else "right")
  for name, values in results.items():
    table.add_row(name, f"{values['top1']:.2%}", f"{values['top5']:.2%}", f"{values['loss']:.4f}", f"{values['count']:,}")
  return table
