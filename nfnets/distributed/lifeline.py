"""Notices when another process of the run fails, dies or falls silent, over the connections that the meeting made."""

import selectors
import threading
import time
from collections.abc import Callable
from typing import Any

from nfnets.distributed import meeting

BEAT_S = 5.0  # seconds between two signs of life
SILENCE_S = 40.0  # seconds without a sign of life after which a process counts as lost


class Watch(threading.Thread):
  """Listens to the other processes until this one is done, and reports the first that fails or is lost.

  Args:
    wires: the connections that the meeting made, by process.
    on_end: called on this thread as on_end(text, status) when another process failed with `status`, or was lost (None).
  """

  def __init__(self, wires: dict[int, meeting.Wire], on_end: Callable[[str, int | None], None]):
    super().__init__(name="watch over the other processes", daemon=True)
    self._wires, self._on_end, self._over = dict(wires), on_end, threading.Event()

  @property
  def over(self) -> bool:
    """Whether this process itself has told the others that it is done or failed."""
    return self._over.is_set()

  def run(self) -> None:
    """Reads what the others send, sends signs of life, and returns after the first loss or failure."""
    selector, last_beat = selectors.DefaultSelector(), 0.0
    for index, wire in self._wires.items():
      wire.sock.settimeout(BEAT_S)
      wire.heard = time.monotonic()
      selector.register(wire.sock, selectors.EVENT_READ, index)
    while not self._over.is_set() and self._wires:
      for key, _ in selector.select(0.5):
        message = self._read_end(key.data)
        if message is not None and "bye" in message:
          selector.unregister(self._wires.pop(key.data).sock)
        elif message is not None:
          return self._end(key.data, message)
      now = time.monotonic()
      for index, wire in list(self._wires.items()):
        if now - wire.heard > SILENCE_S:
          return self._end(index, {"lost": index, "why": f"it gave no sign of life for {SILENCE_S:g} s"})
      if now - last_beat > BEAT_S:
        last_beat = now
        self._tell(beat=1)
    selector.close()

  def _read_end(self, index: int) -> dict[str, Any] | None:
    """Reads from process `index`: its message that it is done, failed or lost; None for signs of life alone."""
    try:
      return next((message for message in self._wires[index].read() if "beat" not in message), None)
    except (EOFError, ConnectionError):
      return {"lost": index, "why": "its connection was closed"}
    except (OSError, ValueError) as error:
      return {"lost": index, "why": str(error)}

  def _tell(self, **message: object) -> None:
    """Sends `message` to all others."""
    for wire in list(self._wires.values()):
      try:
        wire.send(**message)
      except OSError:
        pass  # the next read from it fails too, and reports the loss

  def _end(self, index: int, message: dict[str, Any]) -> None:
    """Passes the end of process `index` on to the others and to `on_end`, unless this process ends by itself already."""
    if self._over.is_set():
      return
    if "lost" in message:
      text = message.get("text") or f"process {index} ({self._wires[index].who}) was lost: {message['why']}"
      self._tell(lost=index, text=text)
      self._on_end(text, None)
    else:
      self._tell(**message)
      self._on_end(message["text"], message["status"])

  def fail(self, text: str, status: int) -> None:
    """Tells the others that this process ends with `status`, so that they do not wait for it, nor call it lost."""
    self._over.set()
    self._tell(end=True, text=text, status=status)

  def close(self) -> None:
    """Tells the others that this process is done."""
    self._over.set()
    self._tell(bye=True)
