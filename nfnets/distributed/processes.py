"""Joins this process to the others of its run, and ends them together.

`jax.distributed` joins them. Before it, detect.py finds out which engine started us, and the processes meet (meeting.py); after
it, they watch each other (lifeline.py), because JAX itself answers every trouble with SIGABRT.
"""

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable

import jax

from nfnets.distributed import detect, lifeline, meeting
from nfnets.distributed.errors import ProcessError
from nfnets.distributed.exit_status import LOST

TIMEOUT_S = 50.0  # how long processes wait for each other at the start
Say = Callable[[str], None]
print_line: Say = functools.partial(print, flush=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Processes:
  """This process is number `index`, from 0, of `count`, as `engine` says."""

  index: int
  count: int
  engine: str


_me: Processes | None = None  # set before the processes meet, so that errors name the process
_started = False
_watch: lifeline.Watch | None = None


def start(
  *,
  coordinator: str | None = None,
  count: int | None = None,
  index: int | None = None,
  timeout_s: float = TIMEOUT_S,
  say: Say = print_line,
) -> Processes:
  """Joins this process to the others of its run; process 0 says in one line which engine named them.

  Call it before anything starts a JAX backend; a second call returns what the first did. A run of one process needs no network
  and starts nothing. From then on, in a run of several, a process that fails or is lost ends the others, after a line on stderr:
  with its exit status, or with LOST within lifeline.SILENCE_S (at once where only the process died).

  Args:
    coordinator: HOST:PORT at which process 0 listens. This and the next two, where not given, come from JAX's detection (Open
      MPI, SLURM, TPU pod, Kubernetes), or the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or
      SkyPilot's; with none of them the run has one process.
    count: number of processes.
    index: number of this process, from 0.
    timeout_s: how long processes wait for each other.
    say: prints the line.

  Raises:
    ProcessError: impossible values, a busy port, or a wrong number of processes.
    LostPeer: some processes have not come within `timeout_s`.
    RuntimeError: a JAX backend is already started.
  """
  global _me, _started, _watch
  if _started and _me is not None:
    return _me
  if jax.distributed.is_initialized():  # the caller did it, and watches the processes in its own way
    _me, _started = Processes(jax.process_index(), jax.process_count(), "jax.distributed, started before"), True
    return _me
  membership = detect.detect(os.environ, coordinator=coordinator, count=count, index=index)
  placement, suggested = detect.complete(membership, timeout_s)
  _me = Processes(placement.index, placement.count, placement.engine)
  if placement.count == 1:
    say(f"processes: one ({placement.engine})")
    _started = True
    return _me
  if placement.index == 0:
    say(f"processes: 0 of {placement.count} ({placement.engine}), coordinator {placement.coordinator}")
  bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
  wires = meeting.meet(placement.coordinator, placement.count, placement.index, bind=bind, timeout_s=timeout_s)
  _bypass_proxy(placement.coordinator.rpartition(":")[0])
  _watch = lifeline.Watch(wires, _end_with)
  _watch.start()
  # JAX's preemption service would catch SIGTERM, and until our own handler is installed nothing would end the process
  jax.config.update("jax_enable_preemption_service", False)
  # JAX's own heartbeat (100 s), which ends a process by SIGABRT, is slower than the watch
  jax.distributed.initialize(
    placement.coordinator,
    placement.count,
    placement.index,
    cluster_detection_method="deactivate",
    local_device_ids=detect.local_devices(os.environ, suggested),
    initialization_timeout=int(timeout_s) + 10,
  )
  _me = Processes(jax.process_index(), jax.process_count(), placement.engine)  # a TPU numbers its processes by itself
  if _me.count != placement.count:
    raise ProcessError(
      f"{placement.engine}: {placement.count} processes, but JAX's {jax.default_backend()} backend sees {_me.count}"
    )
  _started = True
  return _me


def shutdown() -> None:
  """Waits until all processes have called it, then disconnects; with one process it does nothing else than forget it."""
  global _me, _started, _watch
  if _watch is not None:
    jax.distributed.shutdown()
    _watch.close()
    _watch = None
  _me, _started = None, False


def label() -> str:
  """Returns the prefix of an error's text, e.g. "process 1 of 2: "; empty in a run of one process."""
  return f"process {_me.index} of {_me.count}: " if _me is not None and _me.count > 1 else ""


def fail(error: object, status: int, text: str) -> None:
  """Prints `text` on stderr, ends this process with `status`, and makes the others end with it too.

  It is for a program's very end: no `finally` runs any more, since closing JAX properly needs the other processes. In a run of
  one process it returns at once.
  """
  if _watch is None or _me is None:
    return
  if not isinstance(error, ProcessError):
    time.sleep(1)  # `error` may come from a collective that failed because of a lost process, which the watch then reports
  sys.stderr.write(text)
  _watch.fail(f"process {_me.index} failed (status {status}): {' '.join(str(error).split())[:500]}", status)
  # the message must be sent before the connections close, and JAX would abort the others if process 0 ended before them
  time.sleep(0.3 if _me.index else 1.5)
  _leave(status)


def _end_with(text: str, status: int | None) -> None:
  """Ends this process since another was lost (status None) or failed; runs on the watch's thread."""
  if _watch is None or _me is None:
    return  # `shutdown` has left the run meanwhile
  again = "; run the same command again" if status is None else ""
  if status is not None:
    time.sleep(0.3)  # if the same cause raised an error here too, that is printed first
  if not _watch.over:
    sys.stderr.write(f"{label()}error: {text}{again}\n")
  if status is not None or _me.index == 0:
    time.sleep(0.3)  # the others must receive our message first: process 0's end makes JAX abort them
  _leave(LOST if status is None else status)


def _leave(status: int) -> None:
  """Flushes the output and ends the process without any cleaning up."""
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except (OSError, ValueError):
      pass
  os._exit(status)


def _bypass_proxy(host: str) -> None:
  """Makes gRPC connect to `host` directly: through a cluster's HTTP proxy, JAX would wait for the coordinator for ever."""
  if any(name.lower() in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy") for name in os.environ):
    before = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy") or ""
    os.environ["no_grpc_proxy"] = ",".join(filter(None, [before, host.strip("[]")]))
