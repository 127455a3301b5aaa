"""Signals that ask a run to stop."""

import contextlib
import os
import signal
from collections.abc import Iterator


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
