"""Which of a network's classes belongs to each class of a data set, where the two differ."""

import collections
import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from nfnets.data.errors import reason
from nfnets.data.sources.base import Source
from nfnets.data.storage.regular import read_regular
from nfnets.errors import UserError
from nfnets.train.checkpoints.compatibility import class_difference

_LARGEST_MAP = 1 << 24  # bytes; a thousand classes take some thousand


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
  """The classes that an evaluation distinguishes.

  Attributes:
    names: of them, in their order.
    columns: int [classes], of the network's logits; None takes all as they are.
    labels: int [images], places in `names`.
  """

  names: tuple[str, ...]
  columns: np.ndarray | None
  labels: np.ndarray

  def logits(self, logits: np.ndarray) -> np.ndarray:
    """Those of the distinguished classes alone: [n, classes]."""
    return logits if self.columns is None else logits[:, self.columns]


def columns_by(choice: str, names: Sequence[str], num_classes: int, source: Source) -> np.ndarray | None:
  """Returns the network's class of each class of the data, int [classes]; None where they are the same.

  Args:
    choice: "" or "present": both have the same classes; "names": those of the data are found among the network's by their names;
      else a JSON file {"source": "where this comes from", "classes": [the network's class for each of the data's, by its number
      or name]}.
    names: the network's classes; empty where they are not known.
    num_classes: of the network.
    source: the data.

  Raises:
    UserError: the classes do not fit, or the file cannot be read.
  """
  if choice in ("", "present"):
    if source.num_classes != num_classes:
      raise UserError(
        f"{source.name} has {source.num_classes:,} classes, the weights {num_classes:,}; expected as many (--data says "
        "which images), or a --classes_map (names, or a JSON file) that says which of the network's belongs to each"
      )
    return None
  wanted: list[str | int] = list(source.class_names) if choice == "names" else _read_map(choice)
  if len(wanted) != source.num_classes:
    raise UserError(f"--classes_map={choice} has {len(wanted):,} classes, {source.name} {source.num_classes:,}; expected as many")
  places, times = {name: place for place, name in enumerate(names)}, collections.Counter(names)
  columns = [entry if isinstance(entry, int) else places.get(entry, -1) for entry in wanted]
  for label, (column, entry) in enumerate(zip(columns, wanted, strict=True)):
    if isinstance(entry, str) and times[entry] > 1:
      raise UserError(
        f"--classes_map={choice}: class {label} of {source.name} is {entry!r}, which is the name of several classes of the "
        "weights; expected the number of one, in a JSON file"
      )
    if not 0 <= column < num_classes:
      raise UserError(
        f"--classes_map={choice}: class {label} of {source.name} is {entry!r}, which is no class of the weights; expected "
        + (f"a name such as {names[0]!r} or " if names else "")
        + f"a number below {num_classes:,}"
      )
  if len(set(columns)) != len(columns):
    raise UserError(
      f"--classes_map={choice} gives two classes of {source.name} the same class of the network; expected another each"
    )
  return np.asarray(columns, np.int64)


def check_names(names: Sequence[str], source: Source) -> None:
  """Raises UserError where network and data name their classes differently; nothing is compared where the names are unknown."""
  difference = class_difference(names, source.class_names) if names else ""
  if difference:
    raise UserError(
      f"{source.name} has other classes than the weights: {difference}; expected the same names, --other_class_names where the "
      "same classes only have other names, or --classes_map"
    )


def distinguish(choice: str, columns: np.ndarray | None, labels: np.ndarray, source: Source) -> Classes:
  """Makes the classes of an evaluation of the images' labels; "present" leaves out the classes that no image has."""
  if choice != "present":
    return Classes(names=source.class_names, columns=columns, labels=labels)
  present, places = np.unique(labels, return_inverse=True)
  return Classes(names=tuple(source.class_names[label] for label in present), columns=present, labels=places)


def _read_map(path: str) -> list[str | int]:
  try:
    content = json.loads(read_regular(path, _LARGEST_MAP).decode())
  except OSError as error:
    raise UserError(f"--classes_map={path} cannot be read: {reason(error)}") from error
  except (ValueError, RecursionError) as error:
    raise UserError(f"--classes_map={path} is no JSON: {reason(error)}") from error
  entries = content.get("classes") if isinstance(content, dict) else None
  if not isinstance(entries, list) or not all(type(entry) in (int, str) for entry in entries):
    raise UserError(f'--classes_map={path}: expected {{"source": …, "classes": [a number or name for each class of the data]}}')
  return entries
