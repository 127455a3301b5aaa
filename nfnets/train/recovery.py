"""What happens after a bad step: where the first number was not finite, which checkpoint to go back to, when to give up."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfnets import distributed
from nfnets.agc import named_leaves
from nfnets.config import Config
from nfnets.distributed.watchdog import FIRST_STEP_S
from nfnets.models import loops
from nfnets.train.logs.window import Metrics
from nfnets.train.run import Run
from nfnets.train.step import sharding
from nfnets.train.step.gradients import Batch, ascended, batch_loss, row_keys, step_key
from nfnets.train.step.state import TrainState


class NonFiniteError(FloatingPointError):
  """A loss or gradient was not finite, or the loss too high; the message says at which step, where, and the last checkpoint."""


def check_bad_steps(run: Run, window: list[Metrics]) -> None:
  """Says which steps of the window, oldest first, were skipped.

  Raises:
    NonFiniteError: more steps than config.max_bad_steps have been skipped.
  """
  total = int(run.state.bad_steps)
  for step, metrics in enumerate(window, run.step - len(window) + 1):
    if metrics["bad"]:
      run.log.warn(
        f"step {step} skipped: loss {metrics['loss_sum'] / metrics['count']:.4g}, gradient norm "
        f"{metrics['grad_norm']:.4g}; {total} bad step{'s' * (total > 1)} so far"
      )
  if run.config.on_bad_step == "skip" and total > run.config.max_bad_steps:
    raise NonFiniteError(
      f"{total} bad steps up to step {run.step}, more than config.max_bad_steps={run.config.max_bad_steps}; "
      f"{_last_checkpoint(run)}"
    )


def handle_halt(run: Run, window: list[Metrics]) -> None:
  """Finds out why a step was bad; the run then goes on from the last checkpoint, with the images that follow the bad batch.

  Args:
    run: whose state says `halted`.
    window: the metrics of its last steps, the bad one among them, on the host.

  Raises:
    NonFiniteError: going back is not asked for, or was done too often, or there is no checkpoint.
  """
  run.note_corrupt(window)
  bad_step, rollbacks = int(run.state.step), int(run.state.bad_steps)  # the bad step counted from 0, as the schedule does
  batch_number = bad_step + int(run.state.passed_over)
  bad_metrics = next(metrics for metrics in window if metrics["bad"])
  run.watchdog.expect(f"the search for the cause of bad step {bad_step + 1}", FIRST_STEP_S)  # it compiles
  problem = _what_was_bad(run, bad_metrics, lambda: run.batches[batch_number])
  run.writer.settle()
  last, hint = run.reader.choose(), _last_checkpoint(run)
  wanted, limit = run.config.on_bad_step == "rollback", run.config.max_bad_steps
  if wanted and rollbacks > limit:
    hint = f"rolled back {rollbacks - 1} times before, as often as config.max_bad_steps={limit} allows; {hint}"
  elif wanted and last is not None:
    run.log.warn(f"{problem}; back to step {last}, on with other images (time {rollbacks} of at most {limit})")
    numbers = {"bad_steps": np.int32(rollbacks), "passed_over": np.int32(batch_number + 1 - last)}
    placed = {name: sharding.put(number, getattr(run.like, name)) for name, number in numbers.items()}
    run.restore(last, **placed)
    run.log.rewind(run.step)
    run.watchdog.expect(f"step {run.step + 1}")
    return
  raise NonFiniteError(f"{problem}; {hint}")


def _last_checkpoint(run: Run) -> str:
  last = run.reader.choose()
  return f"last good checkpoint: {run.reader.path(last) if last is not None else 'none yet'}"


def _what_was_bad(run: Run, metrics: Metrics, make_batch: Callable[[], dict[str, np.ndarray]]) -> str:
  loss, mean, step = metrics["loss_sum"] / metrics["count"], float(run.state.loss_mean), int(run.state.step) + 1
  if np.isfinite(loss) and 0 < run.config.spike * mean < loss:
    return f"loss {loss:.4g} at step {step} is above config.spike={run.config.spike:g} × its running mean {mean:.4g}"
  layer = first_nonfinite(run.config, run.graph, run.state, lambda: sharding.put_batch(run.mesh, make_batch()))
  return f"loss or gradient not finite at step {step}: {layer}"


def first_nonfinite(config: Config, graph: nnx.GraphDef, state: TrainState, make_batch: Callable[[], Batch]) -> str:
  """Says where a number first was not finite, in one line, for this state and batch.

  That is the first layer, in the order of the forward pass, whose output is not finite; if all are, the first, in the order of
  the backward pass, whose parameters' gradient is not. With SAM, this is looked for at the weights that the whole batch would
  ascend to. To be called by all processes: where one of them cannot look (it lacks memory for every layer's output, its batch
  cannot be made), none does.
  """
  names: list[str] = []

  def look(params: nnx.State, stats: nnx.State, batch: Batch, step: jax.Array) -> tuple[Any, ...]:
    finite: list[jax.Array] = []
    batch = {**batch, "key": row_keys(step_key(config, step), len(batch["image"]))}

    def loss(params: nnx.State) -> tuple[jax.Array, list[jax.Array]]:
      def tap(name: str, x: jax.Array) -> None:
        names.append(name)
        finite.append(jnp.isfinite(x).all())

      value, _ = batch_loss(config, graph, params, stats, batch, tap)
      return value, finite

    weights = ascended(config, graph, params, stats, batch) if config.optim.sam_rho else params
    (value, outputs), grads = jax.value_and_grad(loss, has_aux=True)(weights)
    all_finite = lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), loops.unstack(tree))
    return value, outputs, all_finite(grads), all_finite(params)

  program: Callable[..., Any] | None = None
  arguments: tuple[Any, ...] = ()
  problem = ""
  try:
    arguments = state.params, state.stats, make_batch(), state.step
    program = jax.jit(look).lower(*arguments).compile()
  except Exception as error:  # whatever it is, the bad step is what the person must hear of
    problem = (str(error).splitlines() or [type(error).__name__])[0]
  if distributed.any_process(program is None) or program is None:
    return f"the layer could not be found ({problem or 'another process could not look'})"
  try:
    value, outputs, grads, params = jax.device_get(program(*arguments))
  except jax.errors.JaxRuntimeError as error:
    return f"the layer could not be found ({str(error).splitlines()[0]})"
  return _describe(names, value, outputs, grads, params)


def _describe(names: list[str], loss: float, outputs: list[bool], grads: nnx.State, params: nnx.State) -> str:
  """names: of the layers, in the order of the forward pass; the others: whether each array is finite."""
  not_finite = lambda tree: [path for path, finite, _ in named_leaves(tree) if not finite]
  if paths := not_finite(params):
    return f"parameters themselves are not finite: {paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
  for name, finite in zip(names, outputs, strict=True):
    if not finite:
      return f"first layer whose activations are not finite: {name}"
  if paths := sorted(not_finite(grads), key=lambda path: _place_in_forward_pass(path, names), reverse=True):
    return f"all activations are finite (loss {loss:g}); first layer whose gradient is not: {paths[0]}, of {len(paths)}"
  return (
    f"loss {loss:g}, activations and gradients are finite; gradients or parameters are too large: the learning rate is too high"
  )


def _place_in_forward_pass(path: str, names: list[str]) -> int:
  """The number of the layer that a parameter belongs to, among the `names` of the layers whose outputs are known.

  A layer without an output of its own (squeeze and excite) takes the place of its block, the classifier that of the logits.
  """
  layer = path
  while layer:
    if layer in names:
      return names.index(layer)
    layer = layer.rpartition("/")[0]
  return len(names)
