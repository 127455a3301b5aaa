"""Batches on their way: what threads are filling, and a thread that works ahead."""

import collections
import concurrent.futures
import os
import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np

Batch = dict[str, np.ndarray]


def cores() -> int:
  """Cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pending:
  """A batch that threads are filling."""

  def __init__(self, tasks: list[concurrent.futures.Future], finish: Callable[[], Batch]):
    self._tasks, self._finish = tasks, finish

  def result(self) -> Batch:
    """Waits; raises what a thread raised."""
    for task in self._tasks:
      task.result()
    return self._finish()


def _failed(error: Exception) -> concurrent.futures.Future:
  future: concurrent.futures.Future = concurrent.futures.Future()
  future.set_exception(error)
  return future


def prefetch(
  start: Callable[[int], Pending], first: int, stop: int, *, then: Callable[[Batch], object] = lambda batch: batch, depth: int = 2
) -> Iterator[object]:
  """Yields then(start(step).result()) for the steps, up to `depth` ahead, in a thread that ends with the iteration.

  While one batch is finished and handed to `then` (the transfer to the device), the decoding threads work on the next. An
  exception is raised here, at the step that it belongs to.
  """
  ready: queue.Queue = queue.Queue(maxsize=depth)
  closed = threading.Event()

  def put(item: tuple[object, BaseException | None]) -> bool:
    while not closed.is_set():
      try:
        ready.put(item, timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  def begun(step: int) -> Pending:
    try:
      return start(step)
    except Exception as error:  # told when its turn comes: the step before it is whole
      return Pending([_failed(error)], lambda: {})

  def work() -> None:
    pending: collections.deque[Pending] = collections.deque()
    try:
      for step in range(first, stop + 1):
        if step < stop:
          pending.append(begun(step))
        if step > first and not put((then(pending.popleft().result()), None)):
          return
    except BaseException as error:  # handed over, whatever it is: the consumer must not wait for ever
      put((None, error))

  thread = threading.Thread(target=work, name="prefetch", daemon=True)
  thread.start()
  try:
    for _ in range(first, stop):
      value, error = ready.get()
      if error is not None:
        raise error
      yield value
  finally:
    closed.set()
    thread.join()
