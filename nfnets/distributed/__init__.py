"""Which process am I, are the others there, do we agree? Knows nothing of training."""

from nfnets.distributed.agree import (
  any_process,
  broadcast_from_first,
  differences,
  require_equal,
  require_seen,
  require_shared_storage,
)
from nfnets.distributed.errors import LostPeer, ProcessError
from nfnets.distributed.processes import LOST, STOPPED, TIMEOUT_S, Processes, fail, label, shutdown, start

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
  "shutdown",
  "start",
]
