"""Accuracy on corrupted images, as ImageNet-C has them: 15 corruptions, five severities each (Hendrycks & Dietterich 2019)."""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import rich.table

from nfnets.config import DataConfig
from nfnets.errors import UserError
from nfnets.evaluation.report import png

SEVERITIES = range(1, 6)
# AlexNet's mean top-1 error over the severities, by which the published mCE is normalised (1903.12261; its code).
ALEXNET = {
  "gaussian_noise": 0.886428,
  "shot_noise": 0.894468,
  "impulse_noise": 0.922640,
  "defocus_blur": 0.819880,
  "glass_blur": 0.826268,
  "motion_blur": 0.785948,
  "zoom_blur": 0.798360,
  "snow": 0.866816,
  "frost": 0.826572,
  "fog": 0.819324,
  "brightness": 0.564592,
  "contrast": 0.853204,
  "elastic_transform": 0.646056,
  "pixelate": 0.717840,
  "jpeg_compression": 0.606500,
}


def parts_of(where: str, directory: str = "", split: str = "") -> dict[tuple[str, int], DataConfig]:
  """Names the images of each corruption and severity.

  Args:
    where: a folder CORRUPTION/SEVERITY/CLASS, which may lie in folders of its groups (noise/, blur/, …); or the name of a TFDS
      data set whose configurations are called CORRUPTION_SEVERITY, such as imagenet2012_corrupted.
    directory: of a name, where TFDS has prepared it.
    split: of a name; empty takes "validation".

  Raises:
    UserError: nothing of that form is there.
  """
  top = os.path.expanduser(where)
  if not os.path.isdir(top):
    base = os.path.join(os.path.expanduser(directory or "~/tensorflow_datasets"), where)
    found = [re.fullmatch(r"([a-z_]+)_([1-5])", name) for name in _folders(base)]
    parts = {(match[1], int(match[2])): f"{where}/{match[0]}" for match in found if match}
    data = {part: DataConfig(name=name, dir=directory, test_split=split or "validation") for part, name in parts.items()}
  else:
    groups = [top, *(os.path.join(top, name) for name in _folders(top) if name not in ALEXNET)]
    folders = {
      (name, severity): os.path.join(group, name, str(severity))
      for group in groups
      for name in _folders(group)
      for severity in SEVERITIES
    }
    found = {part: path for part, path in folders.items() if os.path.isdir(path)}
    data = {part: DataConfig(name="folder", dir=path, validation=0.0, test_split=split or "all") for part, path in found.items()}
  if not data:
    raise UserError(
      f"--corruptions={where}: expected a folder with CORRUPTION/1/CLASS … CORRUPTION/5/CLASS in it, or the name of a prepared "
      "TFDS data set with configurations such as gaussian_noise_1"
    )
  return dict(sorted(data.items(), key=lambda item: (_place(item[0][0]), item[0])))


def _folders(path: str) -> list[str]:
  return sorted(name for name in os.listdir(path) if os.path.isdir(os.path.join(path, name))) if os.path.isdir(path) else []


def _place(corruption: str) -> int:
  return [*ALEXNET].index(corruption) if corruption in ALEXNET else len(ALEXNET)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Corrupted:
  """What corruptions cost.

  Attributes:
    errors: top-1 error by corruption and severity.
    counts: images by corruption and severity.
    ce: by corruption: the mean error of its severities over AlexNet's; only where all five are there and AlexNet's is known.
    mean_error: over all corruptions, of the means over their severities.
    mce: the mean of `ce` over the 15 corruptions of ImageNet-C; None where one is missing.
  """

  errors: dict[tuple[str, int], float]
  counts: dict[tuple[str, int], int]
  ce: dict[str, float]
  mean_error: float
  mce: float | None


def measure(right: Mapping[tuple[str, int], tuple[int, int]], *, classes: int) -> Corrupted:
  """Measures what corruptions cost.

  Args:
    right: by corruption and severity, how many images the network had right, and of how many.
    classes: of the data; AlexNet's errors are those of ImageNet's 1,000.
  """
  errors = {part: 1 - correct / count for part, (correct, count) in right.items()}
  names = list(dict.fromkeys(name for name, _ in errors))
  severities = {name: [errors[name, level] for level in SEVERITIES if (name, level) in errors] for name in names}
  means = {name: sum(values) / len(values) for name, values in severities.items()}
  whole = [name for name in names if name in ALEXNET and len(severities[name]) == len(SEVERITIES) and classes == 1000]
  ce = {name: means[name] / ALEXNET[name] for name in whole}
  mce = sum(ce[name] for name in ALEXNET) / len(ALEXNET) if len(ce) == len(ALEXNET) else None
  counts = {part: count for part, (_, count) in right.items()}
  return Corrupted(errors=errors, counts=counts, ce=ce, mean_error=sum(means.values()) / len(means), mce=mce)


def facts(corrupted: Corrupted) -> dict[str, Any]:
  """The same as JSON has it: {"mce", "mean_error", "corruptions": {NAME: {"error": {"1": …}, "images": {"1": …}, "ce"}}}."""
  rows: dict[str, Any] = {}
  for (name, level), error in corrupted.errors.items():
    row = rows.setdefault(name, {"error": {}, "images": {}, "ce": corrupted.ce.get(name)})
    row["error"][str(level)], row["images"][str(level)] = error, corrupted.counts[name, level]
  return {"mce": corrupted.mce, "mean_error": corrupted.mean_error, "corruptions": rows}


def table(corrupted: Corrupted, title: str) -> rich.table.Table:
  """A row for each corruption: its error at each severity, and the corruption error."""
  mce = "not all of ImageNet-C's 15 are there" if corrupted.mce is None else f"mCE {corrupted.mce:.2%}"
  result = rich.table.Table(title=f"{title}\nmean top-1 error {corrupted.mean_error:.2%}, {mce}", title_justify="left")
  for column in ("corruption", *(f"severity {level}" for level in SEVERITIES), "CE"):
    result.add_column(column, justify="left" if column == "corruption" else "right")
  for name, row in facts(corrupted)["corruptions"].items():
    errors = [f"{row['error'][str(level)]:.2%}" if str(level) in row["error"] else "" for level in SEVERITIES]
    result.add_row(name, *errors, "" if row["ce"] is None else f"{row['ce']:.2%}")
  return result


def draw(corrupted: Iterable[tuple[str, Corrupted]]) -> bytes:
  """A PNG with a panel for each corruption: error by severity, a line for each of the weights, by its label."""
  from matplotlib.figure import Figure

  rows = list(corrupted)
  names = list(dict.fromkeys(name for _, row in rows for name, _ in row.errors))
  columns = min(5, len(names))
  lines = -(-len(names) // columns)
  figure = Figure(figsize=(2.3 * columns + 0.6, 2.1 * lines + 0.8), layout="constrained")
  panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat
  markers = "os^Dv"
  for name, panel in zip(names, panels, strict=False):
    for number, (label, row) in enumerate(rows):
      levels = [level for level in SEVERITIES if (name, level) in row.errors]
      values = [100 * row.errors[name, level] for level in levels]
      panel.plot(levels, values, marker=markers[number % len(markers)], label=label)
    panel.set_title(name.replace("_", " "), fontsize=9)
    panel.set_xticks([*SEVERITIES])
    panel.grid(alpha=0.3)
  for panel in panels:  # those that are left over
    panel.set_axis_off()
  figure.supxlabel("severity")
  figure.supylabel("top-1 error, %")
  if len(rows) > 1:
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(rows)))
  return png(figure)
