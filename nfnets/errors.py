"""The one kind of error that a person mends: a wrong field, flag, file or directory. Everything else that goes wrong is a bug."""


class UserError(ValueError):
  """What was asked for cannot be; the message names the value, what was expected, and the field or flag to change.

  Programs answer it with one line and exit status 2. A ValueError that is none of these is a mistake of the program's own, or of
  code that calls it, and keeps its traceback.
  """
