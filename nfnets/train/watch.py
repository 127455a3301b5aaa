"""What watches over a run: signals that ask it to stop, the time lost waiting for data, and a watchdog for runs that hang."""
import contextlib
import faulthandler
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from nfnets.train.processes import LOST, label

FIRST_STEP = 3600.0  # seconds more that the first step is given: it compiles


@contextlib.contextmanager
def stop_on_signals() -> Iterator[list[str]]:
  """A list that gets the name of the first SIGINT or SIGTERM; a second one acts as if nobody listened."""
  received: list[str] = []
  before = {}

  def handle(number, frame):
    received.append(signal.Signals(number).name)
    with contextlib.suppress(OSError):  # Ctrl-C has ended the `tee` that read it
      os.write(2, f"\n{received[0]}: saving after this step; once more to end at once\n".encode())
    for each, handler in before.items():
      signal.signal(each, handler or signal.SIG_DFL)
  try:
    before |= {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
  except ValueError:  # not the main thread: signals are not ours to take
    pass
  try:
    yield received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler or signal.SIG_DFL)


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


class Watchdog:
  """Ends the process with status processes.LOST, all threads' stacks written down, unless `kick` is called every `seconds`.

  One process that hangs holds up all others in their next collective, for ever (jax issue 38503). seconds: 0 = never. The stacks
  go to stderr and to `directory`/stacks-PROCESS.txt. `first`: seconds more until the first kick.
  """

  def __init__(self, seconds: float, directory: str, process: int = 0, *, first: float = FIRST_STEP):
    self._seconds, self._file, self._closed = seconds, pathlib.Path(directory, f"stacks-{process}.txt"), threading.Event()
    self._what, self._due = "the first step", time.monotonic() + seconds + first
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
    if seconds:
      self._thread.start()

  def kick(self, what: str, more: float = 0.0) -> None:
    """Something was finished; `what` is to be finished next, for which `more` seconds are given."""
    self._what, self._due = what, time.monotonic() + self._seconds + more

  def close(self) -> None:
    self._closed.set()
    if self._thread.is_alive():
      self._thread.join()

  def _watch(self) -> None:
    while not self._closed.wait(min(1.0, self._seconds / 4)):
      if time.monotonic() > self._due:
        self._end()

  def _end(self) -> None:
    print(f"{label()}error: {self._what} was not finished within config.watchdog={self._seconds:g} s; stacks in "
          f"{self._file}; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
    try:
      with open(self._file, "w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
      faulthandler.dump_traceback(sys.stderr, all_threads=True)
    finally:
      os._exit(LOST)
