"""How the processes of a run meet before JAX starts, and notice afterwards when one of them is gone.

JAX's coordination service answers a missing process, one too many or a lost one with SIGABRT and a busy port with SIGSEGV
(0.10.2 and 0.12), and needs minutes for some. So the processes meet over plain TCP on the coordinator's port first; process 0
keeps a connection to each other one, over which the kernel tells at once that a process died, and silence that a host did.
"""

import json
import os
import select
import socket
import threading
import time

from nfnets.distributed.errors import LostPeer, ProcessError

BUSY_S = 10.0  # how long a predecessor on the port may take to die


class Wire:
  """One connection, a line of JSON a message. Safe for one reader and many writers."""

  def __init__(self, sock: socket.socket, who: str):
    self.sock, self.who, self.heard = sock, who, time.monotonic()
    self._rest, self._lock = b"", threading.Lock()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

  def send(self, **message: object) -> None:
    """Raises OSError."""
    with self._lock:
      self.sock.sendall(json.dumps(message).encode() + b"\n")

  def read(self) -> list[dict]:
    """The messages that one recv brings; raises EOFError at the end, ValueError for what is no message, OSError."""
    data = self.sock.recv(1 << 16)
    if not data:
      raise EOFError
    self.heard = time.monotonic()
    *lines, self._rest = (self._rest + data).split(b"\n")
    messages = [json.loads(line) for line in lines]
    if len(self._rest) > 1 << 20 or not all(isinstance(message, dict) for message in messages):
      raise ValueError("not a message")
    return messages

  def first(self, deadline: float) -> dict:
    """The next message; raises TimeoutError after `deadline` (time.monotonic) and what `read` raises."""
    while True:
      self.sock.settimeout(max(0.01, deadline - time.monotonic()))
      if messages := self.read():
        return messages[0]

  def close(self) -> None:
    self.sock.close()


def meet(coordinator: str, count: int, index: int, *, bind: str | None, timeout_s: float) -> dict[int, Wire]:
  """Waits until all `count` processes are there: process 0's wires to the others, or another one's to process 0.

  coordinator: HOST:PORT of process 0. bind: HOST:PORT at which process 0 listens; None: everywhere, on that port.
  Raises ProcessError (port busy, two processes of one index, different counts) and LostPeer (somebody did not come).
  """
  deadline = time.monotonic() + timeout_s
  me = {"hello": index, "count": count, "who": f"{socket.gethostname()}, pid {os.getpid()}"}
  if index == 0:
    listener = _listen(bind or coordinator, bind is None, min(deadline, time.monotonic() + BUSY_S))
    with listener:
      return _gather(listener, me, deadline, timeout_s)
  return {0: _join(coordinator, me, deadline, timeout_s)}


def _split(address: str) -> tuple[str, int]:
  host, _, port = address.rpartition(":")
  return host.strip("[]"), int(port)


def _why(error: Exception) -> str:
  number = getattr(error, "errno", None) or 0
  return os.strerror(number) if number > 0 else getattr(error, "strerror", None) or str(error)


def _listen(address: str, everywhere: bool, deadline: float) -> socket.socket:
  host, port = _split(address)
  while True:
    try:
      if not everywhere:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
      if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
      return socket.create_server(("", port), backlog=1024)
    except (OSError, OverflowError) as error:
      if time.monotonic() > deadline or isinstance(error, OverflowError):
        raise ProcessError(
          f"process 0 cannot listen on port {port} ({_why(error)}); end the program that has the port, "
          "or take another for the coordinator"
        ) from error
      time.sleep(0.2)


def _gather(listener: socket.socket, me: dict, deadline: float, timeout_s: float) -> dict[int, Wire]:
  count, wires, trouble = me["count"], {}, None
  while len(wires) < count - 1 and trouble is None:
    ready, _, _ = select.select([listener, *(wire.sock for wire in wires.values())], [], [], max(0, deadline - time.monotonic()))
    if not ready:
      missing = [str(i) for i in range(1, count) if i not in wires]
      many = f"{', '.join(missing[:8])}{' …' if len(missing) > 8 else ''}"
      trouble = LostPeer(
        f"{len(wires) + 1} of {count} processes came within {timeout_s:g} s, missing: {many}; "
        "are they started, and were they given the same coordinator?"
      )
    for index in [index for index, wire in wires.items() if wire.sock in ready]:
      wires.pop(index).close()  # gone before the start: it has to come again
    if listener not in ready:
      continue
    wire = Wire(listener.accept()[0], "")
    try:
      hello = wire.first(time.monotonic() + 5)
      index, theirs, wire.who = int(hello["hello"]), int(hello["count"]), str(hello["who"])
    except (OSError, EOFError, ValueError, KeyError, TypeError):
      wire.close()  # a port scanner, a health check
      continue
    if theirs != count:
      trouble = ProcessError(f"process {index} ({wire.who}) was told of {theirs} processes, process 0 of {count}")
    elif index in wires or index == 0:
      other = wires[index].who if index in wires else me["who"]
      trouble = ProcessError(f"two processes are number {index} of {count}: {other}; {wire.who}")
    wires[index if trouble is None else -1] = wire
  answer = {"ok": True} if trouble is None else {"error": str(trouble), "again": isinstance(trouble, LostPeer)}
  for wire in wires.values():
    try:
      wire.send(**answer)
    except OSError:
      pass  # the watch will find out
  if trouble is not None:
    for wire in wires.values():
      wire.close()
    raise trouble
  return wires


def _join(coordinator: str, me: dict, deadline: float, timeout_s: float) -> Wire:
  host, port = _split(coordinator)
  strange, why = time.monotonic() + BUSY_S, "no answer"
  while True:
    left = deadline - time.monotonic()
    if left <= 0:
      raise LostPeer(
        f"coordinator {coordinator} was not reached within {timeout_s:g} s ({why}); is process 0 running there, "
        "and may this host connect to that port?"
      )
    try:
      wire = Wire(socket.create_connection((host, port), timeout=min(5, left)), f"at {coordinator}")
    except (OSError, OverflowError) as error:
      why = _why(error)
      time.sleep(0.2)
      continue
    try:
      wire.send(**me)
      answer = wire.first(time.monotonic() + timeout_s + 5)  # process 0 may have come later than this one
    except TimeoutError as error:
      wire.close()
      raise LostPeer(
        f"what listens at {coordinator} accepted a connection and then said nothing: process 0 of before may hang there; end it"
      ) from error
    except (OSError, EOFError, ValueError) as error:
      wire.close()
      why = "it hung up or does not speak as process 0 does"
      if time.monotonic() > min(strange, deadline):
        raise ProcessError(
          f"what listens at {coordinator} is not waiting for process {me['hello']} of {me['count']}: the run "
          "there is complete (one process too many?), or another program has the port"
        ) from error
      time.sleep(0.5)
      continue
    if "ok" not in answer:
      wire.close()
      raise (LostPeer if answer.get("again") else ProcessError)(answer.get("error", "process 0 refused"))
    return wire
