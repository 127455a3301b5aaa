"""Labels by several people, of which an image may have many or none: "Are we done with ImageNet?" (2006.07159), and its like."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from nfnets.data.errors import printable
from nfnets.data.sources.base import Source
from nfnets.errors import UserError
from nfnets.evaluation import metrics
from nfnets.evaluation.classes import read_json

_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")  # counted from 1

Labels = list[list[int]] | dict[str, list[int]]


def read(path: str) -> Labels:
  """Reads such labels.

  Args:
    path: a JSON file, either the published real.json, [[label, …] for each validation image of ImageNet in the order of their
      names], or {name of the image's file: [label, …]}.

  Raises:
    UserError: it cannot be read, or has another form.
  """
  content = read_json(path, f"--real_labels={path}")
  entries = content.values() if isinstance(content, dict) else content if isinstance(content, list) else [None]
  if not all(isinstance(entry, list) and all(type(label) is int for label in entry) for entry in entries):
    raise UserError(f"--real_labels={path}: expected a list of lists of labels (real.json), or {{file name: [label, …]}}")
  return content


def measure(labels: Labels, predicted: np.ndarray, index: Sequence[int], source: Source) -> dict[str, Any]:
  """Compares predictions with them; images that have no label at all do not count.

  Args:
    labels: what `read` returns.
    predicted: int [n], the network's class of each image.
    index: the images' numbers in the split.
    source: the split; its files have names.

  Returns:
    {"top1": the share of images whose predicted class is among their labels, "top1_interval": (95 %), "count"}.

  Raises:
    UserError: an image has no name or is not among those that are labelled, or no image has a label.
  """
  right = count = 0
  for number, label in zip(index, predicted.tolist(), strict=True):
    name = source.file_name(number)
    match = _VALIDATION.fullmatch(name)
    if isinstance(labels, dict):
      known = labels.get(name)
    else:
      known = labels[int(match[1]) - 1] if match and 1 <= int(match[1]) <= len(labels) else None
    if known is None:
      raise UserError(
        f"--real_labels: {printable(source.address(number))} is called {printable(name) or 'nothing'}, which is not among the "
        f"{len(labels):,} labelled images; expected "
        + ("their names" if isinstance(labels, dict) else "ILSVRC2012_val_00000001.JPEG and so on")
      )
    count += bool(known)
    right += label in known
  if not count:
    raise UserError("--real_labels: no image of the split has a label")
  return {"top1": right / count, "top1_interval": metrics.interval(right, count), "count": count}
