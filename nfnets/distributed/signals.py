"""Signals that ask a run to stop, and Ctrl-C that ends a program also while its main thread computes.

Python runs a signal's handler between two instructions of the main thread. While that thread compiles, or waits in a system call
for a disk, no handler runs, for minutes. So a thread of ours hears of each signal as well, by `signal.set_wakeup_fd`.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
GRACE_S = 3.0  # that the main thread has to take a KeyboardInterrupt and clean up, before the process ends without it


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
  is a person's Ctrl-C: the first asks to stop (or, after SIGTERM, only says that the run is saving already), the second raises
  KeyboardInterrupt, or ends the process with status 130 where the main thread cannot take that within GRACE_S. Only the main
  thread gets signals: in another thread the request stays false.
  """
  request = StopRequest()
  handled: list[int] = []  # by the main thread
  heard: list[int] = []  # by the watching thread

  def on_signal(number: int, frame: FrameType | None) -> None:
    handled.append(number)
    request.name = request.name or signal.Signals(number).name
    if handled.count(signal.SIGINT) > 1:
      raise KeyboardInterrupt

  def on_heard(number: int, left: threading.Event) -> None:
    heard.append(number)
    request.name = request.name or signal.Signals(number).name
    interrupts = heard.count(signal.SIGINT)
    if number == signal.SIGTERM and len(heard) == 1:
      _say("SIGTERM: saving after this step; Ctrl-C twice (SIGINT) ends at once")
    elif number == signal.SIGINT and interrupts == 1 and signal.SIGTERM in heard:
      _say("SIGINT: SIGTERM came before, the run is saving already; Ctrl-C once more (SIGINT) ends at once")
    elif number == signal.SIGINT and interrupts == 1:
      _say("SIGINT: saving after this step; Ctrl-C once more (SIGINT) ends at once")
    elif number == signal.SIGINT:
      _end_unless(left)

  with _listening({signal.SIGTERM: on_signal, signal.SIGINT: on_signal}, on_heard):
    yield request


@contextlib.contextmanager
def prompt_interrupts() -> Iterator[None]:
  """Ctrl-C raises KeyboardInterrupt, or ends the process with status 130 where the main thread cannot take it within GRACE_S."""

  def on_heard(number: int, left: threading.Event) -> None:
    if number == signal.SIGINT:
      _end_unless(left)

  with _listening({signal.SIGINT: signal.default_int_handler}, on_heard):
    yield


@contextlib.contextmanager
def _listening(
  handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]], on_heard: Callable[[int, threading.Event], None]
) -> Iterator[None]:
  """Sets handlers, and calls `on_heard(number, left)` in a thread for each signal; `left` is set when the context is left."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  left = threading.Event()
  read_end, write_end = os.pipe()
  os.set_blocking(write_end, False)

  def listen() -> None:
    while numbers := os.read(read_end, 64):
      for number in numbers:
        on_heard(number, left)

  listener = threading.Thread(target=listen, name="signals", daemon=True)
  listener.start()
  outer_end = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
  outer_handlers = {number: signal.signal(number, handler) for number, handler in handlers.items()}
  try:
    yield
  finally:
    left.set()
    for number, handler in outer_handlers.items():
      signal.signal(number, handler or signal.SIG_DFL)
    signal.set_wakeup_fd(outer_end)
    os.close(write_end)
    listener.join()
    os.close(read_end)


def _end_unless(left: threading.Event) -> None:
  if not left.wait(GRACE_S):
    _say("error: interrupted")
    sys.stdout.flush()
    os._exit(INTERRUPTED)


def _say(text: str) -> None:
  """Writes a line to stderr, past Python's buffers, since the main thread may be in the middle of a line."""
  with contextlib.suppress(OSError):  # Ctrl-C may have ended the `tee` that reads our stderr
    os.write(2, f"\n{text}\n".encode())
