"""What can be wrong with data: one error for what a person must mend, one for a single record that can be replaced."""

from nfnets.errors import UserError


class DataError(UserError):
  """The data is not there, cannot be read, or is not what the configuration says."""


def reason(error: BaseException) -> str:
  """What an error of somebody else's says, in one line."""
  return getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "") or type(error).__name__


class NoSuchSplit(DataError):
  """The dataset has no split of this name, or not so many records in it."""


class CorruptRecord(DataError):
  """One record cannot be read or decoded. address: where it lies, e.g. "…/x.tfrecord-00003-of-00008 at byte 1234"."""

  def __init__(self, address: str, why: str):
    super().__init__(f"{address}: {why}")
    self.address, self.why = address, why
