"""A watchdog that ends a process which hangs, with the stacks of its threads written down."""

import faulthandler
import os
import pathlib
import sys
import threading
import time

from nfnets.distributed import start

FIRST_STEP = 3600.0  # seconds more that the first step is given: it compiles


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
    print(
      f"{start.label()}error: {self._what} was not finished within config.watchdog={self._seconds:g} s; stacks in "
      f"{self._file}; the same command goes on from the last checkpoint",
      file=sys.stderr,
      flush=True,
    )
    try:
      with open(self._file, "w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
      faulthandler.dump_traceback(sys.stderr, all_threads=True)
    finally:
      os._exit(start.LOST)
