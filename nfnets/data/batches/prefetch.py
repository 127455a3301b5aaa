"""Batches that threads are filling, and a thread that works ahead of the consumer."""

import collections
import concurrent.futures
import os
import queue
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar, overload

import numpy as np

Batch = dict[str, np.ndarray]
Value = TypeVar("Value")


def cores() -> int:
  """Returns the number of cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pending:
  """A batch that threads are filling.

  Args:
    tasks: the threads' tasks; each fills some rows.
    finish: returns the batch once all tasks have ended.
  """

  def __init__(self, tasks: list[concurrent.futures.Future], finish: Callable[[], Batch]):
    self._tasks, self._finish = tasks, finish

  def result(self) -> Batch:
    """Waits for the batch and returns it; raises the exception of a task that failed."""
    for task in self._tasks:
      task.result()
    return self._finish()


def _start_or_fail(start: Callable[[int], Pending], step: int) -> Pending:
  """Calls `start(step)`; its exception is kept for `result()`, because the batches before this step are whole."""
  try:
    return start(step)
  except Exception as error:
    failed: concurrent.futures.Future = concurrent.futures.Future()
    failed.set_exception(error)
    return Pending([failed], lambda: {})


@overload
def prefetch(start: Callable[[int], Pending], first: int, stop: int, *, depth: int = 2) -> Generator[Batch, None, None]: ...


@overload
def prefetch(
  start: Callable[[int], Pending], first: int, stop: int, *, then: Callable[[Batch], Value], depth: int = 2
) -> Generator[Value, None, None]: ...


def prefetch(
  start: Callable[[int], Pending], first: int, stop: int, *, then: Callable[[Batch], Any] = lambda batch: batch, depth: int = 2
) -> Generator[Any, None, None]:
  """Yields `then(start(step).result())` for each step, computed ahead in a thread that ends with the iteration.

  While one batch is finished and handed to `then` (the transfer to the device), the decoding threads work on the next.
  An exception is raised here, at the step that it belongs to.

  Args:
    start: lets the decoding threads begin with the batch of a step.
    first: the first step.
    stop: the step after the last one.
    then: what is done with a batch in the thread that works ahead.
    depth: how many values may wait for the consumer.
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

  def work_ahead() -> None:
    pending: collections.deque[Pending] = collections.deque()
    try:
      for step in range(first, stop + 1):
        if step < stop:
          pending.append(_start_or_fail(start, step))
        if step > first and not put((then(pending.popleft().result()), None)):
          return
    except BaseException as error:  # of any kind: without it the consumer would wait for ever
      put((None, error))

  thread = threading.Thread(target=work_ahead, name="prefetch", daemon=True)
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
