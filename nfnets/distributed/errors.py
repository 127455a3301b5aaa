"""What can go wrong between processes: a mistake that a person must mend, and a process that is gone."""

from nfnets.errors import UserError


class LostPeer(ConnectionError):
  """Another process is not there, or no longer; running the same command again is the remedy."""


class ProcessError(UserError):
  """What was said about the processes cannot be, or they do not fit together; a person must mend it."""
