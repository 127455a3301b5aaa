"""What the tests of checkpoints share."""

import pytest


@pytest.fixture
def said() -> list[str]:
  """Makes a list for the lines that are said."""
  return []
