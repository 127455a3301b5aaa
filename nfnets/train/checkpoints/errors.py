"""What can be wrong with checkpoints: nothing good to go on from, or nothing written."""

from nfnets.errors import UserError


class CheckpointError(UserError):
  """There is no good checkpoint, or it is not one of this configuration's; the message says what is wrong or differs."""


class SaveError(OSError):
  """The last checkpoint of a run could not be written."""


class NoManifestError(CheckpointError):
  """The directory was never finished, or its manifest is lost."""


class NewerError(CheckpointError):
  """A newer nfnets wrote it."""
