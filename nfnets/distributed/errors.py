"""What can go wrong between processes: a mistake that a person must mend, and a process that is gone."""


class LostPeer(ConnectionError):
  """Another process is not there, or no longer; running the same command again is the remedy."""


class ProcessError(ValueError):
  """What was said about the processes cannot be, or they do not fit together; a person must mend it."""
