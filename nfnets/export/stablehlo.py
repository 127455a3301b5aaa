"""Writes a program as StableHLO in one zip file, which jax alone runs: the program with its weights, and what its user must know.

The zip holds "program", which `jax.export.deserialize` reads, and "about.json": classes, preprocessing, form of the input. Nobody
but its maker knows what a program does: run only those of people whom you trust.
"""

import json
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import jax
from jax import export

from nfnets import files
from nfnets.errors import UserError
from nfnets.export.program import Program

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
LIMIT = 2**31 - 1  # bytes of a flatbuffer or protocol buffer, which the program with its weights is


def symbolic_shape(size: int) -> tuple[Any, ...]:
  """The shape of square images of so many pixels a side, for batches of any size."""
  return (*export.symbolic_shape("batch"), size, size, 3)


def exported(program: Program) -> export.Exported:
  """Lowers a program for all `PLATFORMS`. Raises UserError where its weights are larger than a format with them inside holds."""
  if (weights := program.weights_bytes()) > LIMIT:
    raise UserError(f"the weights take {weights:,} bytes, the format holds {LIMIT:,}; expected --dtype=bfloat16")
  return export.export(jax.jit(program), platforms=PLATFORMS)(jax.ShapeDtypeStruct(program.input.shape, program.input.dtype))


def write(path: pathlib.Path, program: Program, about: dict[str, Any]) -> None:
  """Writes the file, whole or not at all.

  Args:
    path: the file; another one there is replaced.
    program: from images to logits.
    about: becomes about.json.

  Raises:
    UserError: the weights are larger than the format holds. OSError: the file cannot be written.
  """
  serialized = exported(program).serialize()
  with files.whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
    archive.writestr("program", bytes(serialized))
    archive.writestr("about.json", json.dumps(about, indent=2))


def read(path: pathlib.Path) -> Callable[[Any], Any]:
  """Reads a file of our own back as a function from images to logits."""
  with zipfile.ZipFile(path) as archive:
    return export.deserialize(bytearray(archive.read("program"))).call
