"""Exact evaluation: every image of a split counts once, on any number of devices and with any batch."""
import operator
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh

from nfnets.data.loader import EvalBatches
from nfnets.train import losses
from nfnets.train.mesh import put_batch

Weights = dict[str, tuple[nnx.State, nnx.State]]  # name → (params, running statistics)


def evaluate(eval_step: Callable, mesh: Mesh, weights: Weights, batches: EvalBatches, *,
             progress: Callable[[int], None] = lambda images: None) -> dict[str, dict[str, float | int]]:
  """{"loss", "top1", "top5", "count"} over all images of `batches`, top-k as fractions, for each of the `weights`.

  Images are read and decoded once for all of them. The last batch is padded and masked. `progress` hears how many images are
  done.
  """
  sums, before = None, None
  for done, part in enumerate(batches, start=1):
    batch = put_batch(mesh, part)
    found = {name: eval_step(params, stats, batch) for name, (params, stats) in weights.items()}
    jax.block_until_ready(before)  # one step ahead is enough; more would only hold their batches
    sums, before = found if sums is None else jax.tree.map(operator.add, sums, found), found
    progress(min(len(batches.source), done * batches.batch))
  return {name: losses.summarize(each) for name, each in jax.device_get(sums).items()}
