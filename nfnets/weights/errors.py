"""What can be wrong with a file of weights."""

from nfnets.errors import UserError


class WeightsError(UserError):
  """A file of weights cannot be read, or does not belong to the network."""
