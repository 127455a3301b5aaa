"""Which of a network's classes belongs to each class of a data set, where the two differ."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from nfnets.data.errors import reason
from nfnets.data.sources.base import Source
from nfnets.data.storage.regular import read_regular
from nfnets.errors import UserError
from nfnets.train.checkpoints.compatibility import class_difference

_MAPS = pathlib.Path(__file__).with_name("maps")
SHIPPED = tuple(sorted(path.stem for path in _MAPS.glob("*.json")))
_LARGEST_JSON = 1 << 26  # bytes; a map of a thousand classes takes some thousand, ReaL's labels a million


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

  def predicted(self, logits: np.ndarray) -> np.ndarray:
    """The network's class of each image, among the distinguished ones: int [n]."""
    places = self.logits(logits).argmax(axis=1)
    return places if self.columns is None else self.columns[places]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
  """How the classes of the data are found among the network's.

  Attributes:
    columns: int [classes of the data], the network's class of each; None where they are the same.
    subset: int [k], rising, the classes of the data that are distinguished, where both have the same; None takes all.
    present: takes those that an image has.
  """

  columns: np.ndarray | None = None
  subset: np.ndarray | None = None
  present: bool = False


def plan(choice: str, names: Sequence[str], num_classes: int, source: Source) -> Plan:
  """Returns which of the network's classes belongs to each of the data's.

  Args:
    choice: "": both have the same classes, of which ImageNet-A and -R by TFDS's names have their 200; "present": the same, but
      only those that an image has are distinguished; "names": those of the data are found among the network's by their names;
      "imagenet_a", "imagenet_r" or a JSON file {"source": "where this comes from", "classes": [the network's class for each of
      the data's, by its number or name]}. Of data with all the network's classes, such a file names those to be distinguished.
    names: the network's classes; empty where they are not known.
    num_classes: of the network.
    source: the data.

  Raises:
    UserError: the classes do not fit, or the file cannot be read.
  """
  if not choice and source.num_classes == num_classes and (family := source.name.partition("/")[0]) in SHIPPED:
    choice = family
  if choice in ("", "present"):
    if source.num_classes != num_classes:
      raise UserError(
        f"{source.name} has {source.num_classes:,} classes, the weights {num_classes:,}; expected as many (--data says "
        f"which images), or a --classes_map (names, {', '.join(SHIPPED)}, or a JSON file) that says which of the network's "
        "belongs to each"
      )
    return Plan(present=choice == "present")
  wanted: list[str | int] = list(source.class_names) if choice == "names" else _read_map(choice)
  part = len(wanted) < source.num_classes == num_classes
  if len(wanted) != source.num_classes and not part:
    raise UserError(f"--classes_map={choice} has {len(wanted):,} classes, {source.name} {source.num_classes:,}; expected as many")
  columns = _columns(choice, wanted, names, num_classes, source)
  return Plan(subset=np.sort(columns)) if part else Plan(columns=columns)


def _columns(choice: str, wanted: Sequence[str | int], names: Sequence[str], num_classes: int, source: Source) -> np.ndarray:
  """The numbers of the network's classes that a map names, int [len(wanted)]; raises UserError as `plan`."""
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


def distinguish(plan: Plan, labels: np.ndarray, source: Source) -> tuple[Classes, np.ndarray]:
  """Makes the classes of an evaluation of the images' labels, and tells which of the images have one of them, bool [images]."""
  subset = np.unique(labels) if plan.present else plan.subset
  if subset is None:
    return Classes(names=source.class_names, columns=plan.columns, labels=labels), np.ones(len(labels), bool)
  kept = np.isin(labels, subset)
  if not kept.any():
    raise UserError(f"--classes_map: no image of {source.name} {source.split} has one of its {len(subset):,} classes")
  names = tuple(source.class_names[label] for label in subset)
  return Classes(names=names, columns=subset, labels=np.searchsorted(subset, labels[kept])), kept


def read_json(path: str, flag: str) -> Any:
  """Reads a JSON file that a flag names, as "--flag=path" in messages. Raises UserError where it cannot be read, or is none."""
  try:
    return json.loads(read_regular(path, _LARGEST_JSON).decode())
  except OSError as error:
    raise UserError(f"{flag} cannot be read: {reason(error)}") from error
  except (ValueError, RecursionError) as error:
    raise UserError(f"{flag} is no JSON: {reason(error)}") from error


def _read_map(path: str) -> list[str | int]:
  content = read_json(str(_MAPS / f"{path}.json") if path in SHIPPED else path, f"--classes_map={path}")
  entries = content.get("classes") if isinstance(content, dict) else None
  if not isinstance(entries, list) or not all(type(entry) in (int, str) for entry in entries):
    raise UserError(f'--classes_map={path}: expected {{"source": …, "classes": [a number or name for each class of the data]}}')
  return entries
