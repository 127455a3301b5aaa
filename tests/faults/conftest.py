"""The long form of the suite is python -m tests.faults, which names a file for the rows of its table in NFNETS_CHAOS."""

import json
import os

import pytest

from tests.faults import runs


def pytest_collection_modifyitems(config, items):
  """Leaves out the tests that are marked `long`, unless this is the long form."""
  long = [item for item in items if item.get_closest_marker("long")]
  if long and "NFNETS_CHAOS" not in os.environ:
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture
def row(request):
  """Gives a function row(inject, shown) that notes what was injected and what it showed; call it after all assertions."""

  def note(inject: str, shown: str, **figures) -> None:
    if path := os.environ.get("NFNETS_CHAOS"):
      with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"test": request.node.nodeid, "inject": inject, "shown": shown, **figures}) + "\n")

  return note


@pytest.fixture(scope="session")
def full() -> bool:
  """Says whether this is the long form."""
  return "NFNETS_CHAOS" in os.environ


@pytest.fixture(scope="session")
def clean(tmp_path_factory):
  """Makes a run of 22 steps without faults."""
  workdir = tmp_path_factory.mktemp("clean")
  ended = runs.run(workdir)
  assert ended.status == 0, ended.output
  return workdir


@pytest.fixture(scope="session")
def clean_pair(tmp_path_factory):
  """Makes the same run with two processes."""
  workdir = tmp_path_factory.mktemp("clean-pair")
  ended = runs.run(workdir, processes=2)
  assert ended.status == 0, ended.output
  return workdir
