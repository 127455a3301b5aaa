"""Exact evaluation: every image of a split counts once, on any number of devices and with any batch."""
import operator
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh

from nfnets.data import loader
from nfnets.data.sources import Images
from nfnets.train import losses
from nfnets.train.mesh import put_batch


def evaluate(eval_step: Callable, mesh: Mesh, params: nnx.State, stats: nnx.State, data: Images, *, batch: int,
             progress: Callable[[int], None] = lambda images: None) -> dict[str, float | int]:
  """{"loss", "top1", "top5", "count"} over all of `data`, top-k as fractions.

  `batch` is rounded up to a multiple of the devices; the last batch is padded and masked. `progress` hears how many
  images are done.
  """
  batch = -(-batch // mesh.size) * mesh.size
  sums, before = None, None
  for done, part in enumerate(loader.eval_batches(data, batch), start=1):
    found = eval_step(params, stats, put_batch(mesh, part))
    jax.block_until_ready(before)  # one step ahead is enough; more would only hold their batches
    sums, before = found if sums is None else jax.tree.map(operator.add, sums, found), found
    progress(min(len(data), done * batch))
  return losses.summarize(jax.device_get(sums))
