"""What happens after a bad step: where the first number was not finite, which checkpoint to go back to, when to give up."""

import jax
import jax.numpy as jnp
from flax import nnx

from nfnets.agc import named_leaves
from nfnets.config import Config
from nfnets.train.step.gradients import Batch, batch_loss, row_keys, step_key
from nfnets.train.step.state import TrainState


def first_nonfinite(config: Config, graph: nnx.GraphDef, state: TrainState, batch: Batch) -> str:
  """One line: the first layer, in the order of the forward pass, whose output is not finite for this state and batch; if all
  are, the first, in the order of the backward pass, whose parameters' gradient is not.
  """
  names: list[str] = []

  def run(params, stats, batch, step):
    finite = []

    def loss(params):
      def tap(name, x):
        names.append(name)
        finite.append(jnp.isfinite(x).all())

      keys = row_keys(step_key(config, step), len(batch["image"]))
      value, _ = batch_loss(config, graph, params, stats, {**batch, "key": keys}, tap)
      return value, finite

    (value, seen), grads = jax.value_and_grad(loss, has_aux=True)(params)
    all_finite = lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)
    return value, seen, all_finite(grads), all_finite(params)

  loss, seen, grads, params = jax.device_get(jax.jit(run)(state.params, state.stats, batch, state.step))
  bad = lambda tree: [path for path, finite, _ in named_leaves(tree) if not finite]
  if broken := bad(params):
    return f"parameters themselves are not finite: {broken[0]}" + (f" and {len(broken) - 1} more" if len(broken) > 1 else "")
  for name, finite in zip(names, seen, strict=True):
    if not finite:
      return f"first layer whose activations are not finite: {name}"
  order = {name: place for place, name in enumerate(names)}
  layer = lambda path: path.rpartition("/")[0]
  if broken := sorted(bad(grads), key=lambda path: order.get(layer(path), len(order)), reverse=True):
    return f"all activations are finite (loss {loss:g}); first layer whose gradient is not: {broken[0]}, of {len(broken)}"
  return f"loss {loss:g}, activations and gradients are finite, the updated parameters are not: the learning rate is too high"
