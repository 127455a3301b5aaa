"""Imports between the rooms of this repository run down the floors only, and no file grows too long to be read at once."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = sorted(path.relative_to(ROOT) for room in ("nfnets", "launch", "configs") for path in (ROOT / room).rglob("*.py"))
LINES = 350

# Room → the rooms that it may import besides itself. A file is in the room with the longest name that fits.
BASE = ("nfnets.errors", "nfnets.files")
MAY_IMPORT = {
  "nfnets.errors": (),
  "nfnets.files": (),
  "nfnets.agc": (),
  "nfnets.config": BASE,
  "nfnets.models": BASE,
  "nfnets.optim": (*BASE, "nfnets.agc", "nfnets.config"),
  "nfnets.distributed": (*BASE, "nfnets"),  # only nfnets/__init__.py, for its __version__
  "nfnets.data.errors": BASE,
  "nfnets.data.images": (*BASE, "nfnets.data.errors"),
  "nfnets.data.storage": (*BASE, "nfnets.data.errors"),
  "nfnets.data.sources": (*BASE, "nfnets.config", "nfnets.data.errors", "nfnets.data.images", "nfnets.data.storage"),
  "nfnets.data.batches": (*BASE, "nfnets.config", "nfnets.data.errors", "nfnets.data.images", "nfnets.data.sources"),
  "nfnets.data.tools": (*BASE, "nfnets.config", "nfnets.data"),
  "nfnets.data": (),
  "nfnets.weights": (*BASE, "nfnets.agc", "nfnets.config", "nfnets.models"),
  "nfnets.export": (*BASE, "nfnets.models"),
  "nfnets.train.step": (*BASE, "nfnets.agc", "nfnets.config", "nfnets.models", "nfnets.optim"),
  "nfnets.train.checkpoints": (*BASE, "nfnets", "nfnets.agc", "nfnets.config", "nfnets.distributed", "nfnets.train.step"),
  "nfnets.train.logs": (*BASE, "nfnets.agc", "nfnets.config", "nfnets.distributed", "nfnets.train.step"),
  "nfnets.train": (
    *BASE,
    "nfnets.agc",
    "nfnets.config",
    "nfnets.models",
    "nfnets.optim",
    "nfnets.distributed",
    "nfnets.data",
    "nfnets.weights",
  ),
  "nfnets.predict": (*BASE, "nfnets.config", "nfnets.models", "nfnets.data", "nfnets.weights", "nfnets.train"),
  "nfnets.evaluation": (
    *BASE,
    "nfnets.config",
    "nfnets.models",
    "nfnets.data",
    "nfnets.weights",
    "nfnets.train",
    "nfnets.predict",
  ),
  "nfnets.measure": (
    *BASE,
    "nfnets.agc",
    "nfnets.config",
    "nfnets.models",
    "nfnets.optim",
    "nfnets.distributed",
    "nfnets.data",
    "nfnets.weights",
    "nfnets.train",
  ),
  "nfnets.lab": (
    *BASE,
    "nfnets",  # only nfnets/__init__.py, for its __version__
    "nfnets.agc",
    "nfnets.config",
    "nfnets.models",
    "nfnets.optim",
    "nfnets.data",
    "nfnets.train.step",
    "nfnets.measure.chips",  # what this machine is
  ),
  "nfnets": ("nfnets.agc", "nfnets.models"),  # nfnets/__init__.py, which holds the package's public names
  "configs": ("nfnets.config", "nfnets.errors", "nfnets.models", "configs"),
  "launch": ("nfnets", "configs"),
}


def module_name(path: pathlib.Path) -> str:
  return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def exists(name: str) -> bool:
  path = ROOT.joinpath(*name.split("."))
  return path.is_dir() or path.with_suffix(".py").is_file()


def imports(source: str, module: str, *, package: bool = False) -> set[str]:
  """Returns the full names of all modules that `source` imports, at the top or inside functions.

  `from a import b` is a.b where b is a module of this project, a otherwise.
  """
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + package]
        base = ".".join([*parts, *filter(None, [base])])
      for alias in node.names:
        name = f"{base}.{alias.name}"
        names.add(name if exists(name) else base)
  return names


def within(name: str, room: str) -> bool:
  return name == room or name.startswith(f"{room}.")


def room_of(module: str) -> str:
  """Returns the room of a module; nfnets itself holds only the modules that MAY_IMPORT names."""
  fitting = [room for room in MAY_IMPORT if within(module, room) and (room != "nfnets" or module == room)]
  assert fitting, f"{module} is in no room; add it to the floors in tests/test_floors.py"
  return max(fitting, key=len)


def all_imports(path: pathlib.Path) -> set[str]:
  return imports((ROOT / path).read_text(encoding="utf-8"), module_name(path), package=path.name == "__init__.py")


def test_imports_are_found_wherever_they_stand():
  source = "import os.path\ndef f():\n  from nfnets import optim, __version__\n  from . import step\n  from ..agc import agc\n"
  expected = {"os.path", "nfnets.optim", "nfnets", "nfnets.train.step", "nfnets.agc"}
  assert imports(source, "nfnets.train.loop") == expected
  assert imports("from .agc import agc", "nfnets", package=True) == {"nfnets.agc"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_down_the_floors(path):
  room = room_of(module_name(path))
  for name in all_imports(path):
    if name.split(".")[0] not in ("nfnets", "launch", "configs", "tests"):
      continue
    exact = [other for other in MAY_IMPORT[room] if other == "nfnets" and room != "launch"]
    rooms = [other for other in (room, *MAY_IMPORT[room]) if other not in exact] if room != "nfnets" else MAY_IMPORT[room]
    allowed = name in exact or any(within(name, other) for other in rooms)
    assert allowed, f"{path} imports {name}; {room} may import {', '.join(MAY_IMPORT[room])}"


def test_no_imports_in_a_circle():
  """Looks at all modules, whether they are imported at the top of a file or inside a function."""
  graph = {
    module_name(path): {name for name in all_imports(path) if name.split(".")[0] in ("nfnets", "launch", "configs")}
    for path in FILES
  }
  done = set()

  def visit(module, trail):
    assert module not in trail, f"imports run in a circle: {' → '.join([*trail[trail.index(module) :], module])}"
    if module not in done:
      for name in sorted(graph.get(module, ())):
        visit(name, [*trail, module])
      done.add(module)

  for module in sorted(graph):
    visit(module, [])


def test_agc_needs_jax_and_optax_alone():
  """The file can so be copied into another project and works there."""
  outside = {name.split(".")[0] for name in all_imports(pathlib.Path("nfnets/agc.py"))} - sys.stdlib_module_names
  assert outside == {"jax", "optax"}


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "nfnets"], ids=str)
def test_the_library_knows_no_flags(path):
  packages = {name.split(".")[0] for name in all_imports(path)}
  assert not packages & {"launch", "configs", "absl", "ml_collections"}


def test_files_stay_readable():
  lines = {str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in FILES}
  assert {path: n for path, n in lines.items() if n > LINES} == {}


def test_no_room_for_odds_and_ends():
  """A file for what has no room shows that a room is missing."""
  odds = {"utils", "util", "helpers", "helper", "common", "misc"}
  assert [str(path) for path in FILES if odds & {*path.parts[:-1], path.stem}] == []
