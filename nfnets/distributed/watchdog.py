"""Ends a process that hangs, and writes down what its threads were doing."""

import faulthandler
import os
import pathlib
import sys
import threading
import time

from nfnets.distributed import processes
from nfnets.distributed.exit_status import LOST

FIRST_STEP_S = 3600.0  # seconds beyond the usual ones for what compiles, or reads a whole dataset for its index


class Watchdog:
  """Ends the process with status LOST when it has not called `expect` for `seconds`.

  A process that hangs holds up all others in their next collective for ever (jax issue 38503).

  Args:
    seconds: how long one piece of work may take; 0 means no limit.
    directory: where the stacks of all threads are written, as stacks-PROCESS.txt; stderr gets them too.
    process: the number of this process.
    first: additional seconds for the first piece of work, which is to open the run.
  """

  def __init__(self, seconds: float, directory: str, process: int = 0, *, first: float = FIRST_STEP_S):
    self._seconds, self._file, self._closed = seconds, pathlib.Path(directory, f"stacks-{process}.txt"), threading.Event()
    self._awaited, self._deadline = "what the run opens", time.monotonic() + seconds + first
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
    if seconds:
      self._thread.start()

  def expect(self, work: str, more: float = 0.0) -> None:
    """Says which piece of work comes next, since the last is finished; it may take the usual seconds and `more`."""
    self._awaited, self._deadline = work, time.monotonic() + self._seconds + more

  def close(self) -> None:
    """Stops watching."""
    self._closed.set()
    if self._thread.is_alive():
      self._thread.join()

  def _watch(self) -> None:
    """Waits for the deadline, on the watchdog's own thread."""
    while not self._closed.wait(min(1.0, self._seconds / 4)):
      if time.monotonic() > self._deadline:
        self._end_process()

  def _end_process(self) -> None:
    """Prints the error, writes the stacks and ends the process, whatever fails on the way."""
    try:
      print(
        f"{processes.label()}error: {self._awaited} took longer than config.watchdog={self._seconds:g} s; stacks in "
        f"{self._file}; the same command goes on from the last checkpoint",
        file=sys.stderr,
        flush=True,
      )
      with open(self._file, "w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
      faulthandler.dump_traceback(sys.stderr, all_threads=True)
    finally:
      os._exit(LOST)
