"""Exact evaluation: every image of a split counts once, on any number of devices and with any batch."""

import operator
from collections.abc import Callable

import jax
import rich.console
import rich.progress
import rich.table
from flax import nnx
from jax.sharding import Mesh

from nfnets.data.batches.evaluation import EvalBatches
from nfnets.train.step import losses, sharding

Weights = dict[str, tuple[nnx.State, nnx.State]]  # name → (params, running statistics)


def evaluate(
  eval_step: Callable,
  mesh: Mesh,
  weights: Weights,
  batches: EvalBatches,
  *,
  progress: Callable[[int], None] = lambda images: None,
) -> dict[str, dict[str, float | int]]:
  """{"loss", "top1", "top5", "count"} over all images of `batches`, top-k as fractions, for each of the `weights`.

  Images are read and decoded once for all of them. The last batch is padded and masked. `progress` hears how many images are
  done.
  """
  sums, before = None, None
  for done, part in enumerate(batches, start=1):
    batch = sharding.put_batch(mesh, part)
    found = {name: eval_step(params, stats, batch) for name, (params, stats) in weights.items()}
    jax.block_until_ready(before)  # one step ahead is enough; more would only hold their batches
    sums, before = found if sums is None else jax.tree.map(operator.add, sums, found), found
    progress(min(len(batches.source), done * batches.batch))
  return {name: losses.summarize(each) for name, each in jax.device_get(sums).items()}


def results_table(title: str, results: dict[str, dict[str, float]]) -> rich.table.Table:
  """Rows of top-1, top-5, loss and images for "params" and "ema"."""
  table = rich.table.Table(title=title, title_justify="left")
  for column in ("weights", "top-1", "top-5", "loss", "images"):
    table.add_column(column, justify="left" if column == "weights" else "right")
  for name, found in results.items():
    table.add_row(name, f"{found['top1']:.2%}", f"{found['top5']:.2%}", f"{found['loss']:.4f}", f"{found['count']:,}")
  return table
