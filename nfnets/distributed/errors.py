"""The errors between processes: a mistake that a person must mend, and a process that is lost."""

from nfnets.errors import UserError


class LostPeer(ConnectionError):
  """Another process has not come, or was lost; running the same command again is the remedy."""


class ProcessError(UserError):
  """The values given for the processes are impossible, or the processes do not fit together; a person must mend it."""
