"""Weights with what their user must know, and our own form of a file of them: how it is written, and how it is read back."""

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
    preprocessing: of the evaluation, as configuration: test_crop, test_crop_pct, test_resize, test_image_size, mean and std are
      set. None where it follows from `config`.
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


def facts_of(stored: Stored, data: DataConfig) -> dict[str, Any]:
  """What our files say beside the arrays, so that no recipe is needed to use them; `of_export` reads it back.

  Args:
    stored: the weights.
    data: the preprocessing of an evaluation: the test_… fields (no size: as stored), mean and std.

  Returns:
    {"config", "num_classes", "class_names", "preprocessing": {"crop", "crop_pct" (None: as published), "size": pixels,
    "interpolation", "resize": whose interpolation, "mean", "std"}}.
  """
  return {
    "config": dataclasses.asdict(stored.config),
    "num_classes": stored.num_classes,
    "class_names": list(stored.class_names),
    "preprocessing": {
      "crop": data.test_crop,
      "crop_pct": data.test_crop_pct,
      "size": data.test_image_size,
      "interpolation": "bicubic",
      "resize": data.test_resize,
      "mean": list(data.mean),
      "std": list(data.std),
    },
  }


def as_metadata(facts: dict[str, Any]) -> dict[str, str]:
  """Facts as safetensors has them: texts, which are JSON where the fact is none."""
  return {name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in facts.items()}


def as_file(arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> bytes:
  """The bytes of our safetensors file. facts: those of `facts_of`, and whatever else is to be known."""
  import safetensors.numpy

  return safetensors.numpy.save(arrays, as_metadata({"format": "nfnets", **facts}))


def _json(metadata: dict[str, str], key: str, kind: type) -> Any:
  try:
    value = json.loads(metadata[key])
  except (KeyError, ValueError, RecursionError) as error:
    raise WeightsError(f"its metadata have no {key} that can be read") from error
  if not isinstance(value, kind) or isinstance(value, bool):
    raise WeightsError(f"its metadata's {key} is {type(value).__name__}, expected {kind.__name__}")
  return value


def _preprocessing(saved: dict[str, Any]) -> DataConfig:
  """What `facts_of` says of the preprocessing, as configuration, which checks the values."""
  missing = {"crop", "size", "mean", "std"} - set(saved)
  if missing:
    raise WeightsError(f"its preprocessing lacks {', '.join(sorted(missing))}")
  if not all(isinstance(saved[name], list) for name in ("mean", "std")):
    raise WeightsError("its preprocessing's mean and std must be lists of three numbers")
  data = DataConfig(
    test_crop=saved["crop"],
    test_crop_pct=saved.get("crop_pct"),
    test_resize=saved.get("resize", "tensorflow"),
    test_image_size=saved["size"],
    mean=tuple(saved["mean"]),
    std=tuple(saved["std"]),
  )
  data.validate()
  return data
