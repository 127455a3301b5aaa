"""Signals that ask a run to stop."""

import contextlib
import os
import signal
from collections.abc import Iterator


class StopRequest:
  """Is true once a signal has asked this process to stop; any thread may read it.

  Attributes:
    name: the first signal's name, e.g. "SIGTERM"; empty until it comes.
  """

  def __init__(self) -> None:
    self.name = ""

  def __bool__(self) -> bool:
    return bool(self.name)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
  """Turns SIGTERM and SIGINT into a StopRequest, so that the run can save before it ends.

  SIGTERM may come any number of times, since schedulers send several; only the first counts, and none ends the process. SIGINT
  is a person's Ctrl-C: the first asks to stop (or, after SIGTERM, only says that the run is saving already), the second ends
  the process as it would without this function. Only the main thread gets signals: in another thread the request stays false.
  """
  request = StopRequest()
  previous_handlers = {}

  def on_terminate(number, frame):
    if not request:
      request.name = "SIGTERM"
      _say("SIGTERM: saving after this step; Ctrl-C twice (SIGINT) ends at once")

  def on_interrupt(number, frame):
    signal.signal(signal.SIGINT, previous_handlers[signal.SIGINT] or signal.SIG_DFL)
    if request:
      _say(f"SIGINT: {request.name} came before, the run is saving already; Ctrl-C once more (SIGINT) ends at once")
    else:
      request.name = "SIGINT"
      _say("SIGINT: saving after this step; Ctrl-C once more (SIGINT) ends at once")

  with contextlib.suppress(ValueError):  # outside the main thread
    for number, handler in ((signal.SIGTERM, on_terminate), (signal.SIGINT, on_interrupt)):
      previous_handlers[number] = signal.getsignal(number)
      signal.signal(number, handler)
  try:
    yield request
  finally:
    with contextlib.suppress(ValueError):
      for number, handler in previous_handlers.items():
        signal.signal(number, handler or signal.SIG_DFL)


def _say(text: str) -> None:
  """Writes a line to stderr; os.write, unlike print, is safe in a signal handler."""
  with contextlib.suppress(OSError):  # Ctrl-C may have ended the `tee` that reads our stderr
    os.write(2, f"\n{text}\n".encode())
