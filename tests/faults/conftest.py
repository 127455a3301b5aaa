"""The long form of the suite is python -m tests.faults, which names a file for the rows of its table in NFNETS_CHAOS."""

import json
import os

import pytest

from tests.faults import runs


def pytest_collection_modifyitems(config, items):
  """What is marked `long` belongs to the long form alone."""
  long = [item for item in items if item.get_closest_marker("long")]
  if long and "NFNETS_CHAOS" not in os.environ:
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture
def row(request):
  """row(inject, shown): notes what was injected and what it showed, once the test's assertions are behind it."""

  def note(inject: str, shown: str, **figures) -> None:
    if path := os.environ.get("NFNETS_CHAOS"):
      with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"test": request.node.nodeid, "inject": inject, "shown": shown, **figures}) + "\n")

  return note


@pytest.fixture(scope="session")
def full() -> bool:
  """Whether this is the long form."""
  return "NFNETS_CHAOS" in os.environ


@pytest.fixture(scope="session")
def clean(tmp_path_factory):
  """A run of 22 steps without faults."""
  workdir = tmp_path_factory.mktemp("clean")
  ended = runs.run(workdir)
  assert ended.status == 0, ended.output
  return workdir


@pytest.fixture(scope="session")
def clean_pair(tmp_path_factory):
  """The same on two processes."""
  workdir = tmp_path_factory.mktemp("clean-pair")
  ended = runs.run(workdir, processes=2)
  assert ended.status == 0, ended.output
  return workdir
