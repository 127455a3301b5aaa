"""Evaluates weights on a split: their protocol, the logits of every image, and the measures of them."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from nfnets.config import DataConfig
from nfnets.data.sources.open import open_source
from nfnets.evaluation import classes, metrics, protocol, real
from nfnets.evaluation.outputs import Outputs, run_split
from nfnets.predict.forward import flipped_logits, logits
from nfnets.weights import network
from nfnets.weights.stored import Stored


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
  """The evaluation of some weights.

  Attributes:
    source: where the weights come from.
    model: the variant's name.
    protocol: in a line, for people.
    data: which images, and how they were shown.
    class_names: of the classes that were distinguished.
    images: what is kept of every image.
    index: int64 [n], their numbers in the split.
    corrupt: what is wrong with the images that were left out, by their number.
    summary: `metrics.summarize`, with "top1_interval" (95 %), "left_out" (images that cannot be read) and "real", see
      `real.measure` (None without such labels).
    temperature: `metrics.temperature_scaling`.
    images_per_s: see `Outputs`.
  """

  source: str
  model: str
  protocol: str
  data: DataConfig
  class_names: tuple[str, ...]
  images: metrics.PerImage
  index: np.ndarray
  corrupt: dict[int, str]
  summary: dict[str, Any]
  temperature: dict[str, float | int] | None
  images_per_s: float | None


def evaluate_weights(
  stored: Stored,
  images: DataConfig | None,
  overrides: protocol.Overrides,
  *,
  batch: int = 256,
  classes_map: str = "",
  real_labels: str = "",
  other_class_names: bool = False,
  progress: Callable[[int, int], None] = lambda done, total: None,
  say: Callable[[str], None] = print,
) -> Evaluated:
  """Evaluates weights on a split; all processes of a run call it together, and all get the result.

  Args:
    stored: the weights.
    images: which images (test_split); None takes those that the weights were trained on.
    overrides: of the weights' protocol.
    batch: images at once, over all devices.
    classes_map: see `classes.plan`.
    real_labels: a file for `real.read`; its labels are classes of the network.
    other_class_names: the data may call the classes by other names; labels are compared by number alone.
    progress: gets the number of images that are done, and of all.
    say: gets a line about whatever takes long or goes wrong.

  Raises:
    UserError: with its kinds: the images cannot be read, or images, classes or protocol do not fit the weights.
  """
  data = protocol.data_config(stored, images, overrides)
  several = real.read(real_labels) if real_labels else None  # before minutes are spent
  with contextlib.closing(open_source(data, data.test_split, progress=say)) as source:
    plan = classes.plan(classes_map, stored.class_names, stored.num_classes, source)
    if plan.columns is None and not other_class_names:
      classes.check_names(stored.class_names, source)
    read = flipped_logits if overrides.flip else logits
    progress(0, len(source))
    outputs = run_split(
      network.build(stored),
      source,
      data,
      lambda net, rows: {"logits": read(net, rows)},
      batch=batch,
      progress=lambda done: progress(done, len(source)),
      say=say,
    )
    told, kept = classes.distinguish(plan, outputs.labels, source)
    outputs = outputs.of(kept)
    by_many = None
    if several is not None:
      by_many = real.measure(several, told.predicted(outputs.values["logits"]), outputs.index.tolist(), source)
  return _measured(stored, data, overrides, outputs, told, by_many)


def _measured(
  stored: Stored,
  data: DataConfig,
  overrides: protocol.Overrides,
  outputs: Outputs,
  told: classes.Classes,
  by_many: dict[str, Any] | None,
) -> Evaluated:
  """Measures the logits of a split; by_many: of `real.measure`."""
  kind, scores = stored.config.loss, told.logits(outputs.values["logits"])
  images = metrics.per_image(scores, told.labels, kind=kind)
  summary: dict[str, Any] = metrics.summarize(images)
  summary["left_out"] = outputs.left_out
  summary["top1_interval"] = metrics.interval(int(images.correct.sum()), len(images))
  summary["real"] = by_many
  return Evaluated(
    source=stored.source,
    model=stored.config.model.name,
    protocol=protocol.describe(data, overrides),
    data=data,
    class_names=told.names,
    images=images,
    index=outputs.index,
    corrupt=dict(sorted(outputs.corrupt.items())),
    summary=summary,
    temperature=metrics.temperature_scaling(scores, told.labels, kind=kind),
    images_per_s=outputs.images_per_s,
  )


def compare_all(evaluated: Sequence[Evaluated]) -> list[dict[str, Any] | None]:
  """Compares each with the first by McNemar's test on the images that both have read; None for the first itself."""
  first = evaluated[0]
  rows: list[dict[str, Any] | None] = [None]
  for other in evaluated[1:]:
    _, mine, theirs = np.intersect1d(first.index, other.index, return_indices=True)
    rows.append(metrics.compare(first.images.correct[mine], other.images.correct[theirs]))
  return rows


def devices() -> str:
  """What computed, for people."""
  return f"{jax.device_count()} × {jax.devices()[0].device_kind}"
