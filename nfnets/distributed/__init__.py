"""Which process am I, are the others there, do we agree? Knows nothing of training.

detect.py: where a process learns its rank. processes.py: joins the processes and ends them together, by way of meeting.py
(before JAX starts) and lifeline.py (afterwards). agree.py: compares what all must have alike. signals.py: requests to stop.
watchdog.py: ends what hangs. exit_status.py: when a launcher starts a run again.
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
