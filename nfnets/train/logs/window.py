"""What is measured and summed up between two lines of the log."""

import time
from collections.abc import Callable, Iterator
from typing import Any


class Waits:
  """Iterates over batches and measures how long the devices had nothing to do but wait for the next one."""

  def __init__(self, batches: Iterator[Any], idle: Callable[[], bool]):
    self._batches, self._idle = batches, idle
    self.restart()

  def __iter__(self) -> Iterator[Any]:
    while True:
      asked = time.perf_counter()
      try:
        batch = next(self._batches)
      except StopIteration:
        return
      if self._idle():  # devices that still have a step to compute did not wait
        self._waited += time.perf_counter() - asked
      yield batch

  def restart(self) -> float:
    """Starts a new window of time; the moment, by time.perf_counter."""
    self._waited, self._since = 0.0, time.perf_counter()
    return self._since

  def share(self) -> float:
    """Waiting's share of the time since the restart, in [0, 1]."""
    return min(1.0, self._waited / max(time.perf_counter() - self._since, 1e-9))
