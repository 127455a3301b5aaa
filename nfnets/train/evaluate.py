"""Exact evaluation: every image of a split counts once, on any number of devices and with any batch."""
import operator
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh

from nfnets.data.loader import EvalBatches
from nfnets.train import losses
from nfnets.train.mesh import put_batch


def evaluate(eval_step: Callable, mesh: Mesh, params: nnx.State, stats: nnx.State, batches: EvalBatches, *,
             progress: Callable[[int], None] = lambda images: None) -> dict[str, float | int]:
  """{"loss", "top1", "top5", "count"} over all images of `batches`, top-k as fractions.

  The last batch is padded and masked. `progress` hears how many images are done.
  """
  sums, before = None, None
  for done, part in enumerate(batches, start=1):
    found = eval_step(params, stats, put_batch(mesh, part))
    jax.block_until_ready(before)  # one step ahead is enough; more would only hold their batches
    sums, before = found if sums is None else jax.tree.map(operator.add, sums, found), found
    progress(min(len(batches.source), done * batches.batch))
  return losses.summarize(jax.device_get(sums))
