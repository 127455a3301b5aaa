"""Lets the processes of a run meet before JAX starts, over connections that afterwards show when one of them is lost.

JAX's coordination service answers a missing process, one too many or a lost one with SIGABRT and a busy port with SIGSEGV
(0.10.2 and 0.12), some of them only after minutes. So the processes first meet over plain TCP on the coordinator's port. Process
0 keeps a connection to each of the others: the kernel closes it when a process dies, and it falls silent when a host dies.
"""

import json
import os
import select
import socket
import threading
import time
from typing import Any

from nfnets.distributed.errors import LostPeer, ProcessError

BUSY_S = 10.0  # seconds that the process of an earlier run on the same port may take to end


class Wire:
  """Carries messages over one connection, each a JSON object on a line; safe for one reading thread and several writing ones.

  Attributes:
    who: the process at the other end, for messages, e.g. "host, pid 7".
    heard: when the last bytes came, by time.monotonic().
  """

  def __init__(self, sock: socket.socket, who: str):
    self.sock, self.who, self.heard = sock, who, time.monotonic()
    self._rest, self._lock = b"", threading.Lock()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

  def send(self, **message: object) -> None:
    """Sends one message; raises OSError."""
    with self._lock:
      self.sock.sendall(json.dumps(message).encode() + b"\n")

  def read(self) -> list[dict]:
    """Returns the messages that one recv completes; raises OSError, EOFError at the end, ValueError for no message."""
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
    """Waits for the next message; raises TimeoutError after `deadline` (time.monotonic), and what `read` raises."""
    while True:
      self.sock.settimeout(max(0.01, deadline - time.monotonic()))
      if messages := self.read():
        return messages[0]

  def close(self) -> None:
    """Closes the connection."""
    self.sock.close()


def meet(coordinator: str, count: int, index: int, *, bind: str | None, timeout_s: float) -> dict[int, Wire]:
  """Waits until all `count` processes have come.

  Args:
    coordinator: HOST:PORT of process 0.
    count: number of processes.
    index: number of this process, from 0.
    bind: HOST:PORT at which process 0 listens; None means on all interfaces, on the coordinator's port.
    timeout_s: how long to wait.

  Returns:
    The connections by process: in process 0 to all others, in another process to process 0 alone.

  Raises:
    ProcessError: the port is busy, two processes have the same index, or their counts differ.
    LostPeer: some process did not come in time.
  """
  deadline = time.monotonic() + timeout_s
  greeting = {"hello": index, "count": count, "who": f"{socket.gethostname()}, pid {os.getpid()}"}
  if index == 0:
    listener = _listen(bind or coordinator, bind is None, min(deadline, time.monotonic() + BUSY_S))
    with listener:
      return _gather(listener, greeting, deadline, timeout_s)
  return {0: _join(coordinator, greeting, deadline, timeout_s)}


def _split(address: str) -> tuple[str, int]:
  """Splits HOST:PORT, of which the host may stand in brackets."""
  host, _, port = address.rpartition(":")
  return host.strip("[]"), int(port)


def _reason(error: Exception) -> str:
  """Puts a socket's error into words, without its number."""
  number = getattr(error, "errno", None) or 0
  return os.strerror(number) if number > 0 else getattr(error, "strerror", None) or str(error)


def _listen(address: str, everywhere: bool, deadline: float) -> socket.socket:
  """Opens process 0's port, on `address` alone or on all interfaces; waits until `deadline` for a port that is busy."""
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
          f"process 0 cannot listen on port {port} ({_reason(error)}); end the program that has the port, "
          "or take another for the coordinator"
        ) from error
      time.sleep(0.2)


def _gather(listener: socket.socket, greeting: dict[str, Any], deadline: float, timeout_s: float) -> dict[int, Wire]:
  """Accepts all other processes, in process 0; tells every one of them whether the run can start, and raises if not."""
  count, wires, trouble = greeting["count"], {}, None
  while len(wires) < count - 1 and trouble is None:
    ready, _, _ = select.select([listener, *(wire.sock for wire in wires.values())], [], [], max(0, deadline - time.monotonic()))
    if not ready:
      trouble = _missing(count, wires, timeout_s)
    for index in [index for index, wire in wires.items() if wire.sock in ready]:
      wires.pop(index).close()  # it ended before the start; a restarted process may still come
    if listener not in ready:
      continue
    wire = Wire(listener.accept()[0], "")
    try:
      hello = wire.first(time.monotonic() + 5)
      index, their_count, wire.who = int(hello["hello"]), int(hello["count"]), str(hello["who"])
    except (OSError, EOFError, ValueError, KeyError, TypeError):
      wire.close()  # a port scanner or a health check
      continue
    if their_count != count:
      trouble = ProcessError(f"process {index} ({wire.who}) was told of {their_count} processes, process 0 of {count}")
    elif index in wires or index == 0:
      other = wires[index].who if index in wires else greeting["who"]
      trouble = ProcessError(f"two processes are number {index} of {count}: {other}; {wire.who}")
    wires[index if trouble is None else -1] = wire
  answer = {"ok": True} if trouble is None else {"error": str(trouble), "again": isinstance(trouble, LostPeer)}
  for wire in wires.values():
    try:
      wire.send(**answer)
    except OSError:
      pass  # the watch will notice
  if trouble is not None:
    for wire in wires.values():
      wire.close()
    raise trouble
  return wires


def _missing(count: int, wires: dict[int, Wire], timeout_s: float) -> LostPeer:
  """Names the processes that have not come."""
  missing = [str(index) for index in range(1, count) if index not in wires]
  names = f"{', '.join(missing[:8])}{' …' if len(missing) > 8 else ''}"
  return LostPeer(
    f"{len(wires) + 1} of {count} processes came within {timeout_s:g} s, missing: {names}; "
    "are they started, and were they given the same coordinator?"
  )


def _join(coordinator: str, greeting: dict[str, Any], deadline: float, timeout_s: float) -> Wire:
  """Connects to process 0 and waits for its answer, trying again while nobody listens."""
  host, port = _split(coordinator)
  stranger_deadline, reason = time.monotonic() + BUSY_S, "no answer"
  while True:
    left = deadline - time.monotonic()
    if left <= 0:
      raise LostPeer(
        f"coordinator {coordinator} was not reached within {timeout_s:g} s ({reason}); is process 0 running there, "
        "and may this host connect to that port?"
      )
    try:
      wire = Wire(socket.create_connection((host, port), timeout=min(5, left)), f"at {coordinator}")
    except (OSError, OverflowError) as error:
      reason = _reason(error)
      time.sleep(0.2)
      continue
    try:
      wire.send(**greeting)
      answer = wire.first(time.monotonic() + timeout_s + 5)  # process 0 may have started later, and so wait longer
    except TimeoutError as error:
      wire.close()
      raise LostPeer(
        f"what listens at {coordinator} accepted a connection and then said nothing: process 0 of before may hang there; end it"
      ) from error
    except (OSError, EOFError, ValueError) as error:
      wire.close()
      reason = "it hung up or does not speak as process 0 does"
      if time.monotonic() > min(stranger_deadline, deadline):
        raise ProcessError(
          f"what listens at {coordinator} is not waiting for process {greeting['hello']} of {greeting['count']}: the run "
          "there is complete (one process too many?), or another program has the port"
        ) from error
      time.sleep(0.5)
      continue
    if "ok" not in answer:
      wire.close()
      raise (LostPeer if answer.get("again") else ProcessError)(answer.get("error", "process 0 refused"))
    return wire
