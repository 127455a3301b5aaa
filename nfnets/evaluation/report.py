"""An evaluation for people and for programs: tables, JSON, a line of CSV for each image, pictures."""

import csv
import io
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import rich.table

from nfnets.data.errors import DataError, printable, reason
from nfnets.data.sources.base import Source
from nfnets.data.tools import inspect
from nfnets.errors import UserError
from nfnets.evaluation import metrics
from nfnets.evaluation.evaluate import Evaluated
from nfnets.evaluation.published import published
from nfnets.files import write_file

_SHOWN = 24  # characters of a class name in a picture


def facts(evaluated: Evaluated, comparison: dict[str, Any] | None, dataset: str) -> dict[str, Any]:
  """What a report says of an evaluation, as JSON has it; what is not a number is None.

  Args:
    evaluated: the evaluation.
    comparison: with the first one, where there are several.
    dataset: whose published figures stand beside it, see `published`.
  """
  look_up = lambda name: published(evaluated.model, name, classes=len(evaluated.class_names), split=evaluated.data.test_split)
  known, by_many = look_up(dataset), evaluated.summary["real"]
  if known:
    known = {**known, "difference": evaluated.summary["top1"] - known["top1"]}
  if by_many and (theirs := look_up(f"{dataset}_real")):
    by_many = {**by_many, "published": {**theirs, "difference": by_many["top1"] - theirs["top1"]}}
  return _plain(
    {
      "weights": evaluated.source,
      "model": evaluated.model,
      "data": {name: getattr(evaluated.data, name) for name in ("name", "dir", "test_split")},
      "protocol": evaluated.protocol,
      **evaluated.summary,
      "real": by_many,
      "temperature": evaluated.temperature,
      "published": known,
      "compared_with_first": comparison,
      "images_per_s": evaluated.images_per_s,
      "corrupt": {str(number): why for number, why in evaluated.corrupt.items()},
    }
  )


def details(evaluated: Evaluated) -> dict[str, Any]:
  """The parts of a report that are long: accuracy of each class, bins of confidence, pairs that are confused."""
  names, images = evaluated.class_names, evaluated.images
  return {
    "per_class": [
      {"class": name, "images": count, "top1": top1}
      for name, (count, top1) in zip(names, metrics.per_class(images, len(names)), strict=True)
    ],
    "reliability": metrics.reliability(images),
    "confused": [
      {"class": names[label], "taken_for": names[predicted], "images": count}
      for label, predicted, count in metrics.confused_pairs(images)
    ],
  }


Rows = Sequence[tuple[Evaluated, dict[str, Any]]]  # each evaluation, with its `facts`


def tables(rows: Rows, title: str) -> list[rich.table.Table]:
  """Tables of accuracy, of calibration and, where there are several, of comparisons with the first; the rows are numbered."""
  result = [_accuracy(rows, title), _calibration(rows)]
  return [*result, _comparison(rows)] if len(rows) > 1 else result


def _accuracy(rows: Rows, title: str) -> rich.table.Table:
  known = any(fact["published"] for _, fact in rows)
  by_many = any(fact["real"] for _, fact in rows)
  columns = ["top-1 (95 %)", "top-5", *(["by real labels (95 %)"] if by_many else []), "loss"]
  columns += [*(["published", "ours − theirs"] if known else []), "images", "images/s"]
  result = _numbered(title, columns)
  for number, (_, fact) in enumerate(rows, start=1):
    cells = [_with_interval(fact), f"{fact['top5']:.2%}", *([_with_interval(fact["real"])] if by_many else [])]
    cells.append(_with_error(fact, "loss"))
    if known:
      theirs = fact["published"]
      cells += [f"{theirs['top1']:.2%} at {theirs['resolution']} px", f"{theirs['difference']:+.2%}"] if theirs else ["", ""]
    speed = fact["images_per_s"]
    result.add_row(str(number), *cells, f"{fact['count']:,}", f"{speed:,.0f}" if speed else "")
  return result


def _calibration(rows: Rows) -> rich.table.Table:
  result = _numbered(
    "calibration; temperature T of every second image, measured on the rest", ["Brier", "ECE", "adaptive ECE", "T", "loss at T"]
  )
  for number, (_, fact) in enumerate(rows, start=1):
    fitted = fact["temperature"]
    cells = [f"{fitted['temperature']:.3f}", f"{fitted['loss_after']:.4f}"] if fitted else ["none", ""]
    result.add_row(str(number), *(_with_error(fact, name) for name in ("brier", "ece", "adaptive_ece")), *cells)
  return result


def _comparison(rows: Rows) -> rich.table.Table:
  result = _numbered("against 1: who alone is right (McNemar's test)", ["difference in top-1 (95 %)", "only 1", "only this", "p"])
  for number, (_, fact) in enumerate(rows[1:], start=2):
    compared = fact["compared_with_first"]
    low, high = compared["interval"]
    difference = f"{compared['difference']:+.2%} ({100 * low:+.2f} to {100 * high:+.2f})"
    result.add_row(str(number), difference, f"{compared['only_first']:,}", f"{compared['only_second']:,}", f"{compared['p']:.3g}")
  return result


def _numbered(title: str, columns: Sequence[str]) -> rich.table.Table:
  result = rich.table.Table(title=title, title_justify="left")
  for column in ("", *columns):
    result.add_column(column, justify="right")
  return result


def write(directory: pathlib.Path, evaluated: Evaluated, fact: dict[str, Any], source: Source, *, per_image: bool) -> list[str]:
  """Writes the files of an evaluation into a directory, each whole or not at all; returns their names.

  They are report.json, reliability.png, confused.png and wrong.png (where anything is wrong), and with `per_image` images.csv.

  Raises UserError where a file cannot be written.
  """
  content = {
    "report.json": json.dumps({**fact, **_plain(details(evaluated))}, indent=1).encode(),
    "reliability.png": draw_reliability(evaluated),
  }
  if per_image:
    content["images.csv"] = csv_lines(evaluated, source).encode()
  if metrics.confused_pairs(evaluated.images):
    content["confused.png"] = draw_confused(evaluated)
    content["wrong.png"] = draw_wrong(evaluated, source)
  try:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
      write_file(directory / name, data)
  except OSError as error:
    raise UserError(f"--out={directory}: cannot be written: {reason(error)}") from error
  return sorted(content)


def csv_lines(evaluated: Evaluated, source: Source) -> str:
  """A line for each image: its number and address, label and prediction by name, confidence, rank of the label, loss, Brier."""
  out, images, names = io.StringIO(), evaluated.images, evaluated.class_names
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow(["index", "image", "label", "predicted", "confidence", "rank", "loss", "brier"])
  for row, index in enumerate(evaluated.index.tolist()):
    label, predicted = printable(names[images.label[row]]), printable(names[images.predicted[row]])
    numbers = [f"{value[row]:.6g}" for value in (images.loss, images.brier)]
    address = printable(source.address(index))
    writer.writerow([index, address, label, predicted, f"{images.confidence[row]:.6f}", images.rank[row], *numbers])
  return out.getvalue()


# ---- pictures


def draw_reliability(evaluated: Evaluated) -> bytes:
  """A PNG of accuracy over confidence in bins of equal width, and of how many images each bin has."""
  from matplotlib.figure import Figure

  rows = metrics.reliability(evaluated.images)
  centres, width = [(row["low"] + row["high"]) / 2 for row in rows], 1 / len(rows)
  figure = Figure(figsize=(5.5, 6.5), layout="constrained")
  above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
  above.bar(centres, [row["accuracy"] or 0 for row in rows], width, color="C0", edgecolor="white", label="accuracy")
  filled = [row for row in rows if row["count"]]
  above.plot([row["confidence"] for row in filled], [row["accuracy"] for row in filled], "k.", label="mean confidence of the bin")
  above.plot([0, 1], [0, 1], color="0.5", lw=1)
  above.set_title(f"accuracy by confidence, ECE {evaluated.summary['ece']:.4f}", loc="left")
  above.legend(loc="lower right")
  below.bar(centres, [row["count"] for row in rows], width, color="0.6", edgecolor="white")
  below.set_title("images", loc="left")
  below.set_xlabel("confidence")
  return png(figure)


def draw_confused(evaluated: Evaluated) -> bytes:
  """A PNG of the pairs of classes that are confused most often."""
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator

  pairs, names = metrics.confused_pairs(evaluated.images), [_short(name) for name in evaluated.class_names]
  figure = Figure(figsize=(8, 1 + 0.28 * len(pairs)), layout="constrained")
  axes = figure.subplots()
  axes.barh(range(len(pairs)), [count for _, _, count in pairs], color="C3")
  axes.set_yticks(range(len(pairs)), [f"{names[a]} taken for {names[b]}" for a, b, _ in pairs], parse_math=False)
  axes.invert_yaxis()
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.set_title("images of the worst confused pairs", loc="left")
  return png(figure)


def draw_wrong(evaluated: Evaluated, source: Source) -> bytes:
  """A PNG of the wrong images with the largest confidence: what they were taken for, and what they are."""
  pictures, names, images = [], evaluated.class_names, evaluated.images
  for row in metrics.most_confidently_wrong(images):
    index = int(evaluated.index[row])
    try:
      pixels = source.pixels(index, source[index])
    except DataError:
      continue
    said = f"{_short(names[images.predicted[row]])} {images.confidence[row]:.0%}\nis {_short(names[images.label[row]])}"
    pictures.append((pixels, said))
  out = io.BytesIO()
  inspect.draw(out, [(f"most confidently wrong of {len(images):,} images", pictures)])
  return out.getvalue()


def png(figure: Any) -> bytes:
  """A figure of matplotlib as a PNG."""
  out = io.BytesIO()
  figure.savefig(out, dpi=110, format="png")
  return out.getvalue()


def _short(name: str) -> str:
  name = printable(name)
  return name if len(name) <= _SHOWN else f"{name[: _SHOWN - 1]}…"


def _with_interval(fact: dict[str, Any]) -> str:
  low, high = fact["top1_interval"]
  return f"{fact['top1']:.2%} ({100 * low:.2f}–{100 * high:.2f})"


def _with_error(fact: dict[str, Any], name: str) -> str:
  error = fact[f"{name}_se"]
  return f"{fact[name]:.4f}" if error is None else f"{fact[name]:.4f}±{error:.4f}"


def _plain(value: Any) -> Any:
  """The same for JSON, which has no NaN."""
  if isinstance(value, dict):
    return {key: _plain(inner) for key, inner in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(inner) for inner in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
