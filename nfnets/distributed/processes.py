"""Joins this process to the others of its run, and ends them together.

`jax.distributed` is what joins them. Around it: which engine started us (detect.py), and a meeting before the start (meeting.py)
and a watch after it (lifeline.py), because JAX itself answers whatever goes wrong with SIGABRT.
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
  """This process is number `index` of `count`; `engine` says who told it so."""

  index: int
  count: int
  engine: str


_me: Processes | None = None  # known as soon as the engine has said it, so that errors can be told apart
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
  """Joins this process to the others of its run, and says in one line (process 0 does) who told it of them.

  coordinator: HOST:PORT at which process 0 listens; count: of processes; index: of this one, from 0. What is not given comes from
  JAX's detection (Open MPI, SLURM, TPU pod, Kubernetes), or the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID, or SkyPilot's; with none of them it is one process. To be called before anything starts a JAX backend; a second
  call returns what the first did. One process needs no network and starts nothing.

  From then on, in a run of several, a failing or lost process ends the others: with its exit status, or with LOST within
  lifeline.SILENCE_S (at once where only the process died), after a line on stderr.

  Raises ProcessError for values that cannot be, a busy port, a wrong number of processes; LostPeer when not all have come within
  `timeout_s`; RuntimeError when a JAX backend is already started.
  """
  global _me, _started, _watch
  if _started:
    return _me
  if jax.distributed.is_initialized():  # the caller did it, and watches in its own way
    _me, _started = Processes(jax.process_index(), jax.process_count(), "jax.distributed, started before"), True
    return _me
  plan = detect.detect(os.environ, coordinator=coordinator, count=count, index=index)
  plan, suggested = detect.complete(plan, timeout_s)
  _me = Processes(plan.index, plan.count, plan.engine)
  if plan.count == 1:
    say(f"processes: one ({plan.engine})")
    _started = True
    return _me
  if plan.index == 0:
    say(f"processes: 0 of {plan.count} ({plan.engine}), coordinator {plan.coordinator}")
  bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
  wires = meeting.meet(plan.coordinator, plan.count, plan.index, bind=bind, timeout_s=timeout_s)
  _no_proxy_to(plan.coordinator.rpartition(":")[0])
  _watch = lifeline.Watch(wires, _end_with)
  _watch.start()
  # JAX's preemption service would take SIGTERM for itself: until somebody else listens, a process could not be ended
  jax.config.update("jax_enable_preemption_service", False)
  # JAX's own heartbeat (100 s) stays behind the watch: it ends a process by SIGABRT
  jax.distributed.initialize(
    plan.coordinator,
    plan.count,
    plan.index,
    cluster_detection_method="deactivate",
    local_device_ids=detect.local_devices(os.environ, suggested),
    initialization_timeout=int(timeout_s) + 10,
  )
  _me = Processes(jax.process_index(), jax.process_count(), plan.engine)  # a TPU numbers its processes by itself
  if _me.count != plan.count:
    raise ProcessError(f"{plan.engine}: {plan.count} processes, but JAX's {jax.default_backend()} backend sees {_me.count}")
  _started = True
  return _me


def shutdown() -> None:
  """Waits for the other processes to come here too, then parts from them. With one process: nothing."""
  global _me, _started, _watch
  if _watch is not None:
    jax.distributed.shutdown()
    _watch.close()
    _watch = None
  _me, _started = None, False


def label() -> str:
  """What goes before an error's text: "process 1 of 2: ", or nothing where there is but one process."""
  return f"process {_me.index} of {_me.count}: " if _me is not None and _me.count > 1 else ""


def fail(error: object, status: int, text: str) -> None:
  """Prints `text` on stderr, tells the other processes that this one ends with `status`, and they with it, and ends.

  For a program's very end: no `finally` runs any more, since leaving JAX in order needs the others. With one process: nothing.
  """
  if _watch is None:
    return
  if not isinstance(error, ProcessError):
    time.sleep(1)  # a collective that failed because a process was lost: the watch hears of it too, and knows better
  sys.stderr.write(text)
  _watch.fail(f"process {_me.index} failed (status {status}): {' '.join(str(error).split())[:500]}", status)
  # For the words to get out before the connections close; and JAX would abort the others if process 0 went before them.
  time.sleep(0.3 if _me.index else 1.5)
  _leave(status)


def _end_with(text: str, status: int | None) -> None:
  """Another process is gone (status None) or failed; runs on the watch's thread."""
  again = "; run the same command again" if status is None else ""
  if status is not None:
    time.sleep(0.3)  # an error of our own, of the same cause, is printed first
  if not _watch.over:
    sys.stderr.write(f"{label()}error: {text}{again}\n")
  if status is not None or _me.index == 0:
    time.sleep(0.3)  # the others are to hear what we told them; process 0's end makes JAX abort them
  _leave(LOST if status is None else status)


def _leave(status: int) -> None:
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except (OSError, ValueError):
      pass
  os._exit(status)


def _no_proxy_to(host: str) -> None:
  """gRPC would go to the coordinator through the HTTP proxy of a cluster's way out, where JAX waits for ever."""
  if any(name.lower() in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy") for name in os.environ):
    before = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy") or ""
    os.environ["no_grpc_proxy"] = ",".join(filter(None, [before, host.strip("[]")]))
