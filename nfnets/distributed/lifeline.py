"""Notices when another process of the run fails, dies or falls silent, over the connections that the meeting made."""

import selectors
import threading
import time
from collections.abc import Callable

from nfnets.distributed import meeting

BEAT_S = 5.0  # between two signs of life


SILENCE_S = 40.0  # after which a process counts as lost


class Watch(threading.Thread):
  """Listens to the wires for as long as the run goes on.

  on_end(text, status) is called, on this thread, when another process failed with `status` or (None) was lost.
  """

  def __init__(self, wires: dict[int, meeting.Wire], on_end: Callable[[str, int | None], None]):
    super().__init__(name="watch over the other processes", daemon=True)
    self._wires, self._on_end, self._over = dict(wires), on_end, threading.Event()

  @property
  def over(self) -> bool:
    """Whether this process itself has said that it is done or failed."""
    return self._over.is_set()

  def run(self) -> None:
    selector, beat = selectors.DefaultSelector(), 0.0
    for index, wire in self._wires.items():
      wire.sock.settimeout(BEAT_S)
      wire.heard = time.monotonic()
      selector.register(wire.sock, selectors.EVENT_READ, index)
    while not self._over.is_set() and self._wires:
      for key, _ in selector.select(0.5):
        index = key.data
        try:
          ended = next((message for message in self._wires[index].read() if "beat" not in message), None)
        except (OSError, EOFError, ValueError) as error:
          ended = {
            "lost": index,
            "why": "its connection was closed" if isinstance(error, EOFError | ConnectionError) else str(error),
          }
        if ended is not None and "bye" in ended:
          selector.unregister(self._wires.pop(index).sock)
        elif ended is not None:
          return self._end(index, ended)
      now = time.monotonic()
      for index, wire in list(self._wires.items()):
        if now - wire.heard > SILENCE_S:
          return self._end(index, {"lost": index, "why": f"it gave no sign of life for {SILENCE_S:g} s"})
      if now - beat > BEAT_S:
        beat = now
        self._tell(beat=1)
    selector.close()

  def _tell(self, **message: object) -> None:
    for wire in list(self._wires.values()):
      try:
        wire.send(**message)
      except OSError:
        pass  # reading will say it better

  def _end(self, index: int, message: dict) -> None:
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
