"""Averages the weights of several trainings of one network (model soups, 2203.05482), or of several steps of one."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from nfnets import models
from nfnets.weights.errors import WeightsError
from nfnets.weights.stored import Stored

_TRAINING_ONLY = (
  "drop_rate",
  "stochastic_depth",
  "remat",
  "scan",
)  # fields of a network's row that a prediction does not depend on


def average(parts: Iterable[Stored]) -> Stored:
  """Averages arrays of the same names in float64, running statistics included; each result has its array's own dtype.

  BatchNorm's running statistics are averaged as they are: they are not those that the averaged network would measure itself.

  Args:
    parts: two or more; they are taken one after the other, so that only one needs to be in memory beside the sums.

  Returns:
    The averages, with the configuration, classes and preprocessing of the first part.

  Raises:
    WeightsError: there are fewer than two parts, one is another network, has other classes, or normalises images otherwise, or an
      array has NaN or infinity.
  """
  first: Stored | None = None
  sums: dict[str, np.ndarray] = {}
  sources = []
  for part in parts:
    if first is None:
      first, sums = part, {name: np.zeros(array.shape, np.float64) for name, array in part.arrays.items()}
    _check_same(first, part)
    for name, array in part.arrays.items():
      values = array.astype(np.float64)
      if not np.isfinite(values).all():
        raise WeightsError(f"{part.source}: {name} has values that are not finite; leave these weights out")
      sums[name] += values
    sources.append(part.source)
  if first is None or len(sources) < 2:
    raise WeightsError(f"averaging {', '.join(sources) or 'nothing'}: expected the weights of two or more")
  mean = lambda total: np.asarray(total / len(sources))  # of an array without axes, NumPy makes a number, which no file takes
  arrays = {name: mean(total).astype(first.arrays[name].dtype) for name, total in sums.items()}
  return dataclasses.replace(first, source=f"the average of {', '.join(sources)}", arrays=arrays)


def _check_same(first: Stored, part: Stored) -> None:
  """Raises WeightsError where a part does not compute what the first one does with its arrays."""
  shapes, others = ({name: array.shape for name, array in stored.arrays.items()} for stored in (first, part))
  differing = sorted(name for name in shapes | others if shapes.get(name) != others.get(name))
  problems = [f"{name} is {others.get(name, 'missing')}, expected {shapes.get(name, 'none')}" for name in differing]
  before, after = _facts(first), _facts(part)
  problems += [f"{name} is {after[name]!r}, expected {before[name]!r}" for name in before if before[name] != after.get(name)]
  names = list(zip(first.class_names, part.class_names, strict=False))  # either may be unknown
  problems += [
    f"class {label} is {got!r}, expected {expected!r}" for label, (expected, got) in enumerate(names) if got != expected
  ]
  if problems:
    more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise WeightsError(f"{part.source} does not fit {first.source}, so they have no average: {'; '.join(problems[:3])}{more}")


def _facts(stored: Stored) -> dict[str, Any]:
  """What the prediction depends on beside the arrays, by words for people."""
  model, data = stored.config.model, stored.preprocessing or stored.config.data
  row = dataclasses.asdict(models.variant(model.name, **model.all_overrides()))
  return {
    **{f"the network's {name}": value for name, value in row.items() if name not in _TRAINING_ONLY},
    "the number of classes": stored.num_classes,
    "config.loss": stored.config.loss,
    "config.data.mean": tuple(data.mean),
    "config.data.std": tuple(data.std),
  }
