"""Tells which network arrays belong to, from their names and shapes."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from nfnets import models
from nfnets.agc import named_leaves
from nfnets.config import ModelConfig
from nfnets.weights.errors import WeightsError

BLOCKS = 1000  # more than any variant has


def identify(arrays: Mapping[str, np.ndarray], candidates: Iterable[tuple[str, dict[str, Any]]], source: str) -> ModelConfig:
  """Returns the first candidate whose parameters and statistics have the names and shapes of the arrays.

  Args:
    arrays: by our names, such as "blocks/3/conv1/kernel"; among them the classifier "fc/kernel" [features, classes].
    candidates: names of models, with fields of their rows that differ.
    source: where the arrays come from, for messages.

  Raises:
    WeightsError: it is none of them; the message says what is missing, left over or of another shape in the nearest.
  """
  shapes = {name: tuple(array.shape) for name, array in arrays.items()}
  if len(shapes.get("fc/kernel", ())) != 2:
    raise WeightsError(f"{source} has no classifier; expected a network with one (fc, linear or head.fc)")
  depth, problems = stage_depths(shapes), []
  for name, overrides in candidates:
    overrides = overrides | _gate(name, overrides, shapes)
    if models.variant(name, **overrides).depth != depth:
      continue
    wanted = _shapes(name, shapes["fc/kernel"][1], overrides)
    wrong = [f"{key} {wanted[key]} is missing" for key in wanted if key not in shapes]
    wrong += [f"{key} {shapes[key]} is left over" for key in shapes if key not in wanted]
    wrong += [f"{key} is {shapes[key]}, expected {wanted[key]}" for key in wanted if shapes.get(key, wanted[key]) != wanted[key]]
    if not wrong:
      return ModelConfig(name=name, overrides=overrides)
    problems.append((len(wrong), name, wrong))
  if not problems:
    raise WeightsError(f"{source} has {sum(depth)} blocks in stages of {depth or 'none'}, as no network known here has")
  count, name, wrong = min(problems, key=lambda problem: problem[0])
  more = f", and {count - 3} more" if count > 3 else ""
  raise WeightsError(f"{source} is nearest to {name}, but {'; '.join(wrong[:3])}{more}")


def stage_depths(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
  """How many blocks each stage has: a stage begins where a block has a convolution in its shortcut."""
  count = 0
  while f"blocks/{count}/conv0/kernel" in shapes and count < BLOCKS:
    count += 1
  starts = [i for i in range(count) if f"blocks/{i}/conv_shortcut/kernel" in shapes]
  return tuple(end - start for start, end in zip(starts, [*starts[1:], count], strict=True)) if starts else ()


def _gate(name: str, overrides: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
  """The fields `gate` and `se_ratio` where the arrays have squeeze-and-excite and the candidate leaves it open."""
  row, hidden = models.variant(name, **overrides), shapes.get("blocks/0/se/fc0/kernel", ())
  if len(hidden) != 2 or getattr(row, "gate", "se") is not None or 0 in hidden:
    return {}
  return {"gate": "se", "se_ratio": hidden[1] / hidden[0]}


def _shapes(name: str, num_classes: int, overrides: dict[str, Any]) -> dict[str, tuple[int, ...]]:
  network = nnx.eval_shape(lambda: models.create(name, num_classes, **overrides))
  state = nnx.state(network, nnx.Any(nnx.Param, nnx.BatchStat))
  return {path: tuple(leaf.shape) for path, leaf, _ in named_leaves(state)}
