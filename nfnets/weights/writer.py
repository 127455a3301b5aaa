"""Writes weights in our names, timm's or Haiku's, with a model card and what the framework's own loader looks for."""

import contextlib
import dataclasses
import io
import pathlib
import pickle
from typing import Any

import numpy as np

from nfnets import models
from nfnets.config import DataConfig
from nfnets.files import write_file
from nfnets.weights import formats, haiku, timm
from nfnets.weights.card import card, timm_config
from nfnets.weights.errors import WeightsError
from nfnets.weights.stored import Stored, as_metadata, facts_of

# Which files each framework's weights can be, the first where a directory is named.
SUFFIXES = {"nfnets": (".safetensors",), "timm": (".safetensors",), "haiku": (".npz", ".safetensors", ".pkl")}
# Fields of a row that say nothing of the arrays or of what is computed from them at a test.
_TRAINING = ("train_resolution", "test_resolution", "drop_rate", "stochastic_depth", "randaugment", "remat", "scan")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
  """Weights in another framework's names.

  Attributes:
    arrays: by its names, in its layout.
    framework: "nfnets", "timm" or "haiku".
    network: what the framework calls the network.
    remark: in what its outputs will differ; empty where they are the same to rounding.
  """

  arrays: dict[str, np.ndarray]
  framework: str
  network: str
  remark: str = ""


def convert(stored: Stored, framework: str) -> Converted:
  """Returns the weights by the framework's names.

  Raises:
    WeightsError: the framework has no such network.
  """
  model = stored.config.model
  if framework == "nfnets":
    return Converted(arrays=stored.arrays, framework=framework, network=model.name)
  row = models.variant(model.name, **model.all_overrides())
  dialect = getattr(row, "dialect", "official")
  wanted = {"timm": "timm_dm", "haiku": "official"}[framework]
  remark = ""
  other = "norm" not in model.overrides and {dialect, wanted} == {"official", "timm_dm"}
  if other and getattr(row, "activation", "").startswith("gelu"):
    gelu = "gelu_erf" if framework == "timm" else "gelu"
    row = models.variant(model.name, **{**model.all_overrides(), "dialect": wanted, "activation": gelu})
    remark = (
      "timm's dm_ networks compute GELU by erf and add 1e-5 to variances: outputs differ by a few per cent from the release's"
    )
  if framework == "timm":
    name = next(
      (name for name, known in timm.ARCHITECTURES.items() if same_network(row, models.variant(known.name, **known.overrides))),
      None,
    )
    if name is None:
      raise WeightsError(f"{stored.source} is {described(stored)}, which timm has no equal of")
    arrays = timm.to_theirs(stored.arrays, row.depth, gate_inside="regnet" in name)
    return Converted(arrays=arrays, framework=framework, network=name, remark=remark)
  family = haiku.family_of(model.name)
  if (
    family is None
    or getattr(row, "dialect", "official") != "official"
    or getattr(row, "norm", "nf") != getattr(models.variant(model.name), "norm", "nf")  # the name says which network it is
  ):
    raise WeightsError(f"{stored.source} is {described(stored)}, which the release (Haiku) has no equal of")
  arrays = formats.flat(haiku.to_theirs(stored.arrays, family.network))
  return Converted(arrays=arrays, framework=framework, network=family.network, remark=remark)


def described(stored: Stored) -> str:
  """The network in words: its name here, and the fields that differ from its row."""
  overrides = stored.config.model.all_overrides()
  return stored.config.model.name + (
    f" ({', '.join(f'{name}={value}' for name, value in overrides.items())})" if overrides else ""
  )


def same_network(row: Any, other: Any) -> bool:
  """Whether two rows are of one network."""
  if type(row) is not type(other):
    return False
  first, second = (
    {name: value for name, value in dataclasses.asdict(variant).items() if name not in _TRAINING} for variant in (row, other)
  )
  return first == second


def write(
  path: pathlib.Path, converted: Converted, stored: Stored, data: DataConfig, *, sha256: str = "", force: bool = False
) -> list[pathlib.Path]:
  """Writes the weights, a model card README.md beside them and, for timm, its config.json; returns the files, the weights last.

  Args:
    path: a directory, which may be new and gets model.safetensors (or model.npz), or a file with a suffix of `SUFFIXES`.
    converted: what to write.
    stored: where it comes from.
    data: the preprocessing of an evaluation: the test_… fields, mean and std.
    sha256: of the file that was read; empty for a run's checkpoint.
    force: whether files that are already there are replaced.

  Raises:
    WeightsError: a file is already there, or cannot be written; then none is left that was not there before.
  """
  suffixes = SUFFIXES[converted.framework]
  as_file = path.suffix in suffixes and not path.is_dir()
  if path.suffix in (".safetensors", ".npz", ".pkl", ".pth", ".bin") and not as_file:
    raise WeightsError(
      f"{path}: expected a directory, or a file that ends in {' or '.join(suffixes)} for {converted.framework}'s weights"
    )
  folder, weights = (path.parent, path) if as_file else (path, path / f"model{suffixes[0]}")
  if not folder.parent.is_dir() or folder.exists() and not folder.is_dir() or as_file and not folder.is_dir():
    raise WeightsError(f"{path}: there is no directory {folder if as_file else folder.parent} to write in")
  facts = _metadata(converted, stored, data, sha256)
  contents = {
    folder / "README.md": card(weights.name, converted.framework, converted.network, facts, stored, converted.remark).encode()
  }
  if converted.framework == "timm":
    contents[folder / "config.json"] = timm_config(converted.network, stored, data).encode()
  there = [file for file in (*contents, weights) if file.exists()]
  if there and not force:
    raise WeightsError(f"{there[0]} is already there; name another place, such as a new directory, or --force replaces it")
  made = not folder.exists()
  try:
    folder.mkdir(exist_ok=True)
    for file, content in contents.items():
      write_file(file, content)
    write_file(weights, _content(weights, converted.arrays, facts))
  except OSError as error:
    for file in contents:
      if file not in there:
        file.unlink(missing_ok=True)
    if made:
      with contextlib.suppress(OSError):
        folder.rmdir()
    raise WeightsError(f"{path} cannot be written: {error.strerror or error}") from error
  return [*contents, weights]


def _metadata(converted: Converted, stored: Stored, data: DataConfig, sha256: str) -> dict[str, str]:
  """What goes into a safetensors file beside the arrays, and into the card."""
  facts: dict[str, Any] = {
    "format": {"nfnets": "nfnets", "timm": "pt", "haiku": "haiku"}[converted.framework],
    "source": pathlib.PurePath(stored.source).name
    if sha256
    else stored.source,  # an uploaded folder tells nothing of this machine
    "source_sha256": sha256,
    "model": converted.network,
    **facts_of(stored, data),
  }
  return as_metadata(facts)


def _content(path: pathlib.Path, arrays: dict[str, np.ndarray], facts: dict[str, str]) -> bytes:
  """The file's bytes."""
  import safetensors.numpy

  arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
  if path.suffix == ".safetensors":
    return safetensors.numpy.save(arrays, facts)
  if path.suffix == ".npz":
    file = io.BytesIO()
    savez: Any = np.savez  # its other arguments are none of ours
    savez(file, **arrays)
    return file.getvalue()
  modules: dict[str, dict[str, np.ndarray]] = {}
  for name, array in arrays.items():
    module, _, leaf = name.rpartition("/")
    modules.setdefault(module, {})[leaf] = array
  return pickle.dumps(modules, 4)
