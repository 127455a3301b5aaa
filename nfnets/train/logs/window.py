"""The steps between two lines of the log: their metrics, their time, how long the devices waited, and what is said of them."""

import concurrent.futures
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from nfnets.agc import agc_metrics
from nfnets.config import Config
from nfnets.train.step import losses
from nfnets.train.step.state import TrainState

Metrics = dict[str, Any]


class Window:
  """Collects the metrics of steps and measures how long the devices had nothing to do but wait for the next batch; to be closed.

  metrics: of the steps since the last line, oldest first, on the devices.
  """

  def __init__(self):
    self.metrics: list[Metrics] = []
    self._untimed = 0
    self._watcher = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="end of steps")
    self._end: concurrent.futures.Future[float] | None = None  # when the devices ended the last step
    self.restart_clock()

  def batches(self, source: Iterator[Any]) -> Iterator[Any]:
    """Yields from `source`; waiting counts only from when the devices have ended the last step that they were given."""
    while True:
      asked = time.perf_counter()
      try:
        batch = next(source)
      except StopIteration:
        return
      self._batch_came = time.perf_counter()
      if self._end is None:
        self._waited += self._batch_came - asked
      elif self._end.done():
        self._waited += max(0.0, self._batch_came - max(asked, self._end.result()))
      yield batch

  def add(self, metrics: Metrics) -> None:
    """Adds the metrics of a step that the devices were just given."""
    self.metrics.append(metrics)
    self._end = self._watcher.submit(_end_of_step, metrics)

  def close(self) -> None:
    self._watcher.shutdown(wait=False)

  def exclude_steps_so_far(self) -> float:
    """The steps so far do not count for the time that a step takes (the first one compiles).

    Returns the seconds since the last batch came, which are those of one step.
    """
    seconds = time.perf_counter() - self._batch_came
    self._untimed = len(self.metrics)
    self.restart_clock()
    return seconds

  def restart_clock(self) -> None:
    """Begins to measure again: what has happened since the last step (an evaluation, a checkpoint) counts for no step."""
    self._since = self._batch_came = time.perf_counter()
    self._waited = 0.0

  def clear(self) -> None:
    """Begins the window of the next line of the log."""
    self.metrics, self._untimed = [], 0
    self.restart_clock()

  def seconds_per_step(self) -> float | None:
    """None for a window of steps that are left out."""
    timed = len(self.metrics) - self._untimed
    return (time.perf_counter() - self._since) / timed if timed else None

  def waiting_share(self) -> float:
    """Waiting's share of the time since the clock was restarted, in [0, 1]."""
    return min(1.0, self._waited / max(time.perf_counter() - self._since, 1e-9))


def _end_of_step(metrics: Metrics) -> float:
  jax.block_until_ready(metrics)
  return time.perf_counter()


def summarize(
  config: Config, state: TrainState, window: list[Metrics], schedule: Callable[[Any], Any], steps_per_epoch: float
) -> tuple[dict[str, float], dict[str, float]]:
  """What the log says of a window of steps.

  Args:
    config: of the run.
    state: after the last of the steps.
    window: the metrics of each step, on the host.
    schedule: update, from 0 → learning rate.
    steps_per_epoch: may be a fraction.

  Returns:
    (means over the steps that were not bad: "epoch", "loss", "top1", "top5", "lr", "grad_norm", with AGC "clip_fraction", after
    bad steps "bad_steps"; the clip fraction of each layer's kernel at the last step).
  """
  good = [metrics for metrics in window if not metrics["bad"]] or window
  sums = {key: sum(metrics[key].item() for metrics in good) for key in ("loss_sum", "top1", "top5", "count")}
  means = losses.summarize(sums)
  del means["count"]
  updates = int(state.opt_state["learning_rate"].count)  # fewer than steps where bad ones were skipped
  scalars = {
    "epoch": int(state.step) / steps_per_epoch,
    **means,
    "lr": float(schedule(max(updates - 1, 0))),
    "grad_norm": float(np.mean([metrics["grad_norm"] for metrics in good])),
  }
  if bad_steps := int(state.bad_steps):
    scalars["bad_steps"] = bad_steps
  agc_state = state.opt_state.get("agc")  # None without AGC; without config.optim.agc_track, nothing of it is kept
  clipping = {} if agc_state is None or agc_state.paths is None else agc_metrics(jax.device_get(agc_state))
  kernels = {
    path.removesuffix("/kernel"): float(entry["clip_fraction"]) for path, entry in clipping.items() if path.endswith("/kernel")
  }
  if kernels:
    scalars["clip_fraction"] = float(np.mean(list(kernels.values())))  # the mean over layers, as in the picture
  return scalars, dict(sorted(kernels.items(), key=lambda item: _layer_order(item[0])))


def _layer_order(path: str) -> tuple[int, list[tuple]]:
  """A sorting key: the order of the forward pass, numbers by value."""
  top, *rest = path.split("/")
  places = {"stem": 0, "blocks": 1, "final_conv": 2, "fc": 3}
  return places.get(top, 2), [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in rest]
