"""Opens a folder of images: ROOT/train/CLASS/*.jpeg and ROOT/val/CLASS/*.jpeg, or ImageNet's flat val/ from Kaggle."""

import concurrent.futures
import csv
import os
from collections.abc import Callable, Sequence

import numpy as np

from nfnets.data.errors import CorruptRecord, DataError, NoSuchSplit, reason
from nfnets.data.sources.base import Record, Source
from nfnets.data.storage import remote

SUFFIXES = (".jpg", ".jpeg", ".png")
SOLUTION = "LOC_val_solution.csv"  # lines of ImageId,PredictionString; the latter is "CLASS x y x y", further boxes follow
_KAGGLE = os.path.join("ILSVRC", "Data", "CLS-LOC")
_HELD_OUT = ("val", "validation", "test")


class FolderSource(Source):
  """Image files of a folder. files: their paths below `root`; labels: int [n].

  The files have no checksums: damage is detected only if it makes the decoder fail.
  """

  def __init__(self, name: str, split: str, class_names: Sequence[str], root: str, files: Sequence[str], labels: np.ndarray):
    super().__init__(name, split, class_names)
    self._root, self._files, self._labels = root, files, labels

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Record:
    try:
      with open(os.path.join(self._root, self._files[index]), "rb") as stream:
        return Record(stream.read(), int(self._labels[index]))
    except OSError as error:
      raise CorruptRecord(self.address(index), f"cannot be read: {reason(error)}") from error

  def address(self, index: int) -> str:
    return os.path.join(self._root, self._files[index])


def open_folder(directory: str, split: str, progress: Callable[[str], None]) -> Source:
  """Opens the images of a split expression of TFDS over the folders train and val (or validation, test).

  The label of an image is the place of its class folder among train's, sorted by name.

  Args:
    directory: the folder that holds train/ and val/, or that Kaggle's archive of ImageNet was unpacked in.
    split: a split expression such as "train[:98%]".
    progress: called with one line about each step that takes long.

  Raises:
    DataError: there is no such folder, it has no classes, a class is missing in train/, or the flat val/ does not agree
      with its table.
  """
  if remote.is_url(directory):
    raise DataError(f"config.data.dir={directory!r}: a folder of images is read from disks only; in buckets, use a TFDS dataset")
  top = os.path.abspath(os.path.expanduser(directory)) if directory else ""
  if not os.path.isdir(top):
    raise DataError(f"config.data.dir={directory!r} is not a directory; set it to the folder that holds train/ and val/")
  root = os.path.join(top, _KAGGLE) if os.path.isdir(os.path.join(top, _KAGGLE)) else top
  tables = os.path.join(top, SOLUTION), os.path.join(root, "val", SOLUTION)
  table = next((path for path in tables if os.path.isfile(path)), None)

  folders = {name: folder for name in ("train", *_HELD_OUT) if (folder := _folder_of(root, name, table))}
  if not folders:
    raise DataError(f"{root} has neither train/ nor val/ with a folder for each class in it; it has: {_listing(root)}")
  classes = _subfolders(os.path.join(root, folders.get("train") or next(iter(folders.values()))))
  if not classes:
    raise DataError(f"{root}/train has no class folders, which {SOLUTION}'s classes are numbered by")
  scanned: dict[str, tuple[list[str], np.ndarray]] = {}

  def images_of(folder: str) -> tuple[list[str], np.ndarray]:
    if folder not in scanned:
      scanned[folder] = _scan(root, folder, classes, table, progress)
    return scanned[folder]

  parts = _slices(split, {name: lambda folder=folder: len(images_of(folder)[0]) for name, folder in folders.items()}, root)
  files, labels = [], [np.zeros(0, np.int32)]
  for name, start, stop in parts:
    files += images_of(folders[name])[0][start:stop]
    labels.append(images_of(folders[name])[1][start:stop])
  return FolderSource("folder", split, classes, root, files, np.concatenate(labels))


def _folder_of(root: str, name: str, table: str | None) -> str | None:
  """Returns the folder that a split's name means: its own, or another of held-out images; None if there is none.

  Folders without classes do not count; Kaggle's test/ is such a folder, because it has no labels.
  """
  for folder in (name,) if name == "train" else dict.fromkeys((name, *_HELD_OUT)):
    path = os.path.join(root, folder)
    if os.path.isdir(path) and (_subfolders(path) or (table and folder == "val")):
      return folder
  return None


def _slices(split: str, sizes: dict[str, Callable[[], int]], root: str) -> list[tuple[str, int, int]]:
  """Returns (name, start, stop) of each term of a split expression, as TFDS computes them; sizes: counts a folder's images."""
  from tensorflow_datasets.core import splits

  used = [name for name in sizes if name in split]  # the images of the others need not be counted
  infos = {name: splits.SplitInfo(name=name, shard_lengths=[sizes[name]()], num_bytes=0) for name in used}
  try:
    parts = splits.AbstractSplit.from_spec(split).to_absolute(infos)
  except (ValueError, KeyError, NotImplementedError) as error:
    raise NoSuchSplit(f"{root} has no split {split!r} ({reason(error)}); it has: {', '.join(sizes)}") from error
  return [(part.splitname, part.from_ or 0, infos[part.splitname].num_examples if part.to is None else part.to) for part in parts]


def _scan(
  root: str, folder: str, classes: list[str], table: str | None, progress: Callable[[str], None]
) -> tuple[list[str], np.ndarray]:
  """Lists the images of a folder: (paths below root, sorted by class and name; labels, int32 [n])."""
  labels_by_class = {name: label for label, name in enumerate(classes)}
  path = os.path.join(root, folder)
  subfolders = _subfolders(path)
  if not subfolders and table is not None:  # `_folder_of` returns a folder without classes only where there is a table
    return _scan_flat(path, folder, labels_by_class, table)
  unknown = [name for name in subfolders if name not in labels_by_class]
  if unknown:
    raise DataError(f"{path}/{unknown[0]} is a class that train/ has not ({len(unknown)} of {len(subfolders)} classes)")
  if len(subfolders) >= 100:
    progress(f"listing the {len(subfolders):,} class folders of {path}")
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    images = list(pool.map(lambda name: _images(os.path.join(path, name)), subfolders))
  files = [os.path.join(folder, name, file) for name, names in zip(subfolders, images, strict=True) for file in names]
  labels = np.repeat(np.asarray([labels_by_class[name] for name in subfolders], np.int32), [len(names) for names in images])
  return files, labels


def _scan_flat(path: str, folder: str, labels_by_class: dict[str, int], table: str) -> tuple[list[str], np.ndarray]:
  """Lists the images of a folder without class folders, sorted by name; `table` has their classes."""
  files = _images(path)
  labels_by_image = _read_table(table, labels_by_class)
  images = [os.path.splitext(file)[0] for file in files]
  missing = [file for file, image in zip(files, images, strict=True) if image not in labels_by_image]
  if missing:
    raise DataError(f"{table} has no line for {path}/{missing[0]} ({len(missing):,} of {len(files):,} images lack one)")
  return [os.path.join(folder, file) for file in files], np.asarray([labels_by_image[image] for image in images], np.int32)


def _read_table(path: str, labels_by_class: dict[str, int]) -> dict[str, int]:
  """Reads Kaggle's table of the flat val/: the label of each image, by its name without suffix."""
  try:
    with open(path, newline="") as stream:
      rows = [row for row in csv.reader(stream) if row]
    classes = {row[0]: row[1].split()[0] for row in rows[1:]}
  except (OSError, IndexError, UnicodeDecodeError, csv.Error) as error:
    why = getattr(error, "strerror", None) or "expected lines of ImageId,CLASS x y x y"
    raise DataError(f"{path} cannot be read: {why}") from error
  unknown = [name for name in classes.values() if name not in labels_by_class]
  if unknown:
    raise DataError(f"{path} names the class {unknown[0]!r}, which is no folder of train/")
  return {image: labels_by_class[name] for image, name in classes.items()}


def _entries(path: str) -> list[os.DirEntry]:
  """Lists a directory without hidden names, sorted by name."""
  try:
    with os.scandir(path) as entries:
      return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
  except OSError as error:
    raise DataError(f"{path} cannot be listed: {error.strerror}") from error


def _subfolders(path: str) -> list[str]:
  return [entry.name for entry in _entries(path) if entry.is_dir()]


def _images(path: str) -> list[str]:
  return [entry.name for entry in _entries(path) if entry.name.lower().endswith(SUFFIXES)]


def _listing(path: str) -> str:
  """Returns the first names in a directory, for messages."""
  return ", ".join(entry.name for entry in _entries(path)[:10]) or "nothing"
