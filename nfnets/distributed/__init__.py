"""Joins the processes of a run, notices when one is lost, and compares what all of them must have alike. Knows no training.

detect.py finds out the number of this process and of all. processes.py joins the processes and ends them together, by way of
meeting.py (before JAX starts) and lifeline.py (afterwards). agree.py compares values over all processes. signals.py turns signals
into requests to stop. watchdog.py ends a process that hangs. exit_status.py says when a launcher starts a run again.
"""

from nfnets.distributed.agree import (
  any_process,
  broadcast_from_first,
  differences,
  require_equal,
  require_seen,
  require_shared_storage,
)
from nfnets.distributed.errors import LostPeer, ProcessError
from nfnets.distributed.exit_status import LOST, STOPPED, should_restart
from nfnets.distributed.processes import TIMEOUT_S, Processes, fail, label, shutdown, start

__all__ = [
  "LOST",
  "STOPPED",
  "TIMEOUT_S",
  "LostPeer",
  "ProcessError",
  "Processes",
  "any_process",
  "broadcast_from_first",
  "differences",
  "fail",
  "label",
  "require_equal",
  "require_seen",
  "require_shared_storage",
  "should_restart",
  "shutdown",
  "start",
]
