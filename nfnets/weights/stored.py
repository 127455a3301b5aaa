"""Weights as they are stored, with what their user must know; checks what `launch.checkpoint export` wrote beside the arrays."""

import dataclasses
import json
from typing import Any

import numpy as np

from nfnets.config import Config, DataConfig
from nfnets.config.text import from_json
from nfnets.errors import UserError
from nfnets.weights.errors import WeightsError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
  """The arrays of a network and what belongs to them.

  Attributes:
    source: where they come from, for people.
    arrays: numpy arrays by name, such as "blocks/3/conv1/kernel"; running statistics included.
    config: the configuration that they were trained with.
    num_classes: of the classifier.
    class_names: by label; empty where they are not known.
    preprocessing: of the evaluation, as configuration: test_crop, test_image_size, mean and std are set. None where it follows
      from `config`.
  """

  source: str
  arrays: dict[str, np.ndarray]
  config: Config
  num_classes: int
  class_names: tuple[str, ...] = ()
  preprocessing: DataConfig | None = None


def of_export(path: str, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> Stored:
  """Returns what a safetensors file that `launch.checkpoint export` wrote holds.

  Raises:
    WeightsError: the metadata lack what ours have.
  """
  try:
    config = from_json(_json(metadata, "config", dict))
    num_classes = _json(metadata, "num_classes", int)
    names = tuple(_json(metadata, "class_names", list)) if "class_names" in metadata else ()
    preprocessing = _preprocessing(_json(metadata, "preprocessing", dict)) if "preprocessing" in metadata else None
  except UserError as error:
    raise WeightsError(f"{path}: {error}") from error
  if not all(isinstance(name, str) for name in names) or len(names) not in (0, num_classes):
    raise WeightsError(f"{path}: class_names has {len(names):,} entries, expected {num_classes:,} names")
  return Stored(
    source=path, arrays=arrays, config=config, num_classes=num_classes, class_names=names, preprocessing=preprocessing
  )


def _json(metadata: dict[str, str], key: str, kind: type) -> Any:
  try:
    value = json.loads(metadata[key])
  except (KeyError, ValueError, RecursionError) as error:
    raise WeightsError(f"its metadata have no {key} that can be read") from error
  if not isinstance(value, kind) or isinstance(value, bool):
    raise WeightsError(f"its metadata's {key} is {type(value).__name__}, expected {kind.__name__}")
  return value


def _preprocessing(saved: dict[str, Any]) -> DataConfig:
  """The fields of `nfnets.train.resolve.preprocessing` as configuration, which checks their values."""
  missing = {"crop", "size", "mean", "std"} - set(saved)
  if missing:
    raise WeightsError(f"its preprocessing lacks {', '.join(sorted(missing))}")
  if not all(isinstance(saved[name], list) for name in ("mean", "std")):
    raise WeightsError("its preprocessing's mean and std must be lists of three numbers")
  data = DataConfig(test_crop=saved["crop"], test_image_size=saved["size"], mean=tuple(saved["mean"]), std=tuple(saved["std"]))
  data.validate()
  return data
