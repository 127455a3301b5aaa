"""What can be wrong with data: one error that a person must mend, and one for a single record that another can replace."""

from nfnets.errors import UserError


class DataError(UserError):
  """The data is missing, cannot be read, or is not what the configuration says.

  Names of files and classes may hold anything, line breaks and bytes that no terminal takes included: they are escaped.
  """

  def __init__(self, message: str):
    super().__init__(printable(message))


def printable(text: str) -> str:
  """Returns a text with what cannot be printed in a line, such as a line break or a surrogate, as Python escapes it."""
  return text if text.isprintable() else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def reason(error: BaseException) -> str:
  """The message of a library's or the system's error, in one line."""
  return getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "") or type(error).__name__


class UnreadableImage(ValueError):
  """The bytes are no image, not a whole one, or one that would take more memory or time than is allowed."""


class NoSuchSplit(DataError):
  """The dataset has no split of this name, or fewer records in it than were asked for."""


class CorruptRecord(DataError):
  """A single record cannot be read or decoded.

  Args:
    address: the file and the position of the record, e.g. "…/x.tfrecord-00003-of-00008 at byte 1234".
    why: what is wrong with it.
  """

  def __init__(self, address: str, why: str):
    super().__init__(f"{address}: {why}")
    self.address, self.why = address, why
