"""What a fault showed is a row: launch.chaos names a file for them in NFNETS_CHAOS, and prints the table."""
import json
import os

import pytest


@pytest.fixture
def row(request):
  """row(inject, shown): writes down what was injected and what it showed, once the test's assertions are behind it."""
  def write(inject: str, shown: str, **figures) -> None:
    if path := os.environ.get("NFNETS_CHAOS"):
      with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"test": request.node.nodeid, "inject": inject, "shown": shown, **figures}) + "\n")
  return write


@pytest.fixture(scope="session")
def full() -> bool:
  """Whether this is launch.chaos, which takes minutes, or the short form in the test suite."""
  return "NFNETS_CHAOS" in os.environ
