"""Opens a folder of images: ROOT/train/CLASS and ROOT/val/CLASS, ImageNet's flat val/ from Kaggle, or ROOT/CLASS alone."""

import concurrent.futures
import csv
import functools
import io
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from nfnets.config import DataConfig
from nfnets.data.errors import CorruptRecord, DataError, NoSuchSplit, printable, reason
from nfnets.data.sources import stratify
from nfnets.data.sources.base import Record, Source
from nfnets.data.storage import remote
from nfnets.data.storage.regular import read_regular

SUFFIXES = {
  "JPEG": (".jpg", ".jpeg"),
  "PNG": (".png",),
  "GIF": (".gif",),
  "WEBP": (".webp",),
  "BMP": (".bmp",),
  "TIFF": (".tif", ".tiff"),
  "AVIF": (".avif",),
  "JPEG2000": (".jp2",),
  "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
LARGEST = 1 << 30  # bytes of an image file, of which there is one in memory for each thread
_LARGEST_TABLE = 1 << 26  # bytes; Kaggle's has 2 MB
SOLUTION = "LOC_val_solution.csv"  # lines of ImageId,PredictionString; the latter is "CLASS x y x y", further boxes follow
_KAGGLE = os.path.join("ILSVRC", "Data", "CLS-LOC")
# What the folders of the splits are called, in capitals or not.
_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


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
      return Record(read_regular(os.path.join(self._root, self._files[index]), LARGEST), int(self._labels[index]))
    except OSError as error:
      raise CorruptRecord(self.address(index), f"cannot be read: {reason(error)}") from error

  def address(self, index: int) -> str:
    return os.path.join(self._root, self._files[index])

  def file_name(self, index: int) -> str:
    return os.path.basename(self._files[index])

  def content(self) -> Iterable[bytes]:
    yield "\0".join(self._files).replace(os.sep, "/").encode(errors="surrogateescape")
    yield self._labels.astype("<i4").tobytes()


class _Images(NamedTuple):
  """The images of a folder. files: their names; skipped: names of what is none, by its suffix or because it is no file."""

  files: list[str]
  skipped: list[str]


class _Listing(NamedTuple):
  """The images of a split. folder: below the root; names: below that, "CLASS/FILE" but in a flat val/; labels: int32 [n]."""

  folder: str
  names: list[str]
  labels: np.ndarray


class _Term(NamedTuple):
  """A term of a split expression: the images [start, stop) of a split; sliced: whether it is less than all of them."""

  split: str
  start: int
  stop: int
  sliced: bool


def open_folder(config: DataConfig, split: str, progress: Callable[[str], None]) -> Source:
  """Opens the images of a split expression of TFDS over a folder, which has one of two forms.

  Either it holds train/CLASS and val/CLASS (or training/; valid/, validation/; test/, testing/; in capitals or not), or is as
  Kaggle's archive of ImageNet was unpacked. Or it holds CLASS alone: then `config.validation` of each class is for validation, by
  `stratify.held_out`.

  The label of an image is the place of its class folder among train's, sorted by name (0, 1, 2, … by number). A whole split comes
  in the order of its classes and files; a slice is taken from an order that mixes the classes evenly, `stratify.mixed_order`.
  "all" is everything that is there.

  Args:
    config: `dir` is the folder, `formats` are the formats whose files are images.
    split: a split expression such as "train[:98%]".
    progress: called with one line about each step that takes long, and about what is skipped or held out.

  Raises:
    DataError: there is no such folder, it has no classes, a class has no images or is missing in train/, or the flat val/ does
      not agree with its table.
  """
  directory = config.dir
  if remote.is_url(directory):
    raise DataError(f"config.data.dir={directory!r}: a folder of images is read from disks only; in buckets, use a TFDS dataset")
  top = os.path.abspath(os.path.expanduser(directory)) if directory else ""
  if not os.path.isdir(top):
    raise DataError(
      f"config.data.dir={directory!r} is not a directory; set it to the folder that holds train/ and val/, or the classes"
    )
  root = os.path.join(top, _KAGGLE) if os.path.isdir(os.path.join(top, _KAGGLE)) else top
  tables = os.path.join(top, SOLUTION), os.path.join(root, "val", SOLUTION)
  table = next((path for path in tables if os.path.isfile(path)), None)
  suffixes = tuple(suffix for name in config.formats for suffix in SUFFIXES[name])

  folders = _folders_of_splits(root, table)
  if not folders:
    classes = _plain_classes(root, suffixes)
    splits = _divided(root, _scan(root, "", classes, None, progress, suffixes), config.validation, progress)
    return _open_split(root, split, splits, classes, progress)
  classes = _subfolders(os.path.join(root, folders.get("train") or next(iter(folders.values()))))
  if not classes:
    raise DataError(f"{root}/train has no class folders, which {SOLUTION}'s classes are numbered by")
  listed = functools.cache(lambda folder: _scan(root, folder, classes, table, progress, suffixes))
  splits = {name: functools.partial(listed, folder) for name, folder in folders.items()}
  return _open_split(root, split, splits, classes, progress)


def _open_split(
  root: str, split: str, splits: dict[str, Callable[[], _Listing]], classes: list[str], progress: Callable[[str], None]
) -> Source:
  """Opens the images of a split expression. splits: lists the images of each split; says which classes a slice has none of."""
  mixed_order = functools.cache(lambda name: stratify.mixed_order(splits[name]().names, splits[name]().labels))
  files, labels = [], [np.zeros(0, np.int32)]
  terms = _terms(split, splits, root)
  for term in terms:
    folder, names, labels_of_split = splits[term.split]()
    rows = mixed_order(term.split)[term.start : term.stop] if term.sliced else np.arange(len(names))
    files += [os.path.join(folder, names[row]) for row in rows]
    labels.append(labels_of_split[rows])
  source = FolderSource("folder", split, classes, root, files, np.concatenate(labels))
  whole = np.concatenate([np.zeros(0, np.int32), *(splits[term.split]().labels for term in terms if term.sliced)])
  absent = np.setdiff1d(whole, np.concatenate(labels))
  if len(absent):
    progress(
      printable(
        f"{split} of {root} ({len(source):,} images) has none of {len(absent):,} of the {len(classes):,} classes; the first: "
        f"{classes[absent[0]]}"
      )
    )
  return source


def _folders_of_splits(root: str, table: str | None) -> dict[str, str]:
  """Returns the folder of each split that there is: its own, or for held-out images that of another; empty if there is none.

  Folders without classes do not count; Kaggle's test/ is such a folder, because it has no labels.
  """
  found: dict[str, str] = {}
  for split, names in _FOLDERS.items():
    folders = [name for name in _subfolders(root) if name.lower() in names]
    folders = [name for name in folders if _subfolders(os.path.join(root, name)) or (table and name == "val")]
    if len(folders) > 1:
      raise DataError(f"{root} has {folders[0]}/ and {folders[1]}/, which mean the same split, {split}; expected one of them")
    if folders:
      found[split] = folders[0]
  val, test = found.get("val") or found.get("test"), found.get("test") or found.get("val")
  splits = {"train": found.get("train"), "val": val, "validation": val, "test": test}
  return {split: folder for split, folder in splits.items() if folder}


def _plain_classes(root: str, suffixes: tuple[str, ...]) -> list[str]:
  """Returns the classes of a folder without train/ and val/, which are its folders; raises DataError where they are none."""
  classes = _subfolders(root)
  lower = {name.lower() for name in classes}
  flat = all(lower & {*names} for names in (_FOLDERS["train"], (*_FOLDERS["val"], *_FOLDERS["test"])))
  if flat or len(classes) < 2 or not any(_images(os.path.join(root, name), suffixes).files for name in classes):
    raise DataError(
      f"{root} has neither train/ nor val/ with a folder for each class in it, nor two folders of images or more, one for each "
      f"class; it has: {_listing(root)}"
    )
  return classes


def _divided(root: str, images: _Listing, share: float, progress: Callable[[str], None]) -> dict[str, Callable[[], _Listing]]:
  """Divides the images of a folder without train/ and val/ into these splits, and says so; the whole is train if `share` is 0."""
  if not share:
    return {"train": lambda: images}
  mask = stratify.held_out(images.names, images.labels, share)
  part = lambda mask: _Listing("", [images.names[row] for row in np.flatnonzero(mask)], images.labels[mask])
  train, held_out = part(~mask), part(mask)
  absent = len(np.setdiff1d(images.labels, held_out.labels))
  progress(
    printable(
      f"no train/ and val/ in {root}: about {100 * share:g} % of each class ({mask.sum():,} of {len(mask):,} images) are for "
      "validation (config.data.validation)" + (f"; classes of a single image have none ({absent:,})" if absent else "")
    )
  )
  return {"train": lambda: train, **dict.fromkeys(("val", "validation", "test"), lambda: held_out)}


def _terms(split: str, splits: dict[str, Callable[[], _Listing]], root: str) -> list[_Term]:
  """Returns the terms of a split expression, with the limits that TFDS computes. splits: lists the images of each split."""
  from tensorflow_datasets.core import splits as tfds_splits

  if split == "all":
    listings = {id(listed()): name for name, listed in splits.items()}  # two names may mean one folder
    split = "+".join(name for name in splits if name in listings.values())
  sizes = {name: len(listed().names) for name, listed in splits.items() if name in split}  # the others need not be listed
  infos = {name: tfds_splits.SplitInfo(name=name, shard_lengths=[size], num_bytes=0) for name, size in sizes.items()}
  try:
    parts = tfds_splits.AbstractSplit.from_spec(split).to_absolute(infos)
  except (ValueError, KeyError, NotImplementedError) as error:
    slices = ", of which slices can be taken, as train[:90%] and train[90%:]" if [*splits] == ["train"] else ""
    raise NoSuchSplit(f"{root} has no split {split!r} ({reason(error)}); it has: {', '.join(splits)}{slices}") from error
  limits = lambda part: (part.from_ or 0, sizes[part.splitname] if part.to is None else part.to)
  return [_Term(part.splitname, *limits(part), (part.from_, part.to) != (None, None)) for part in parts]


def _scan(
  root: str, folder: str, classes: list[str], table: str | None, progress: Callable[[str], None], suffixes: tuple[str, ...]
) -> _Listing:
  """Lists the images of a folder, sorted by class and name."""
  labels_by_class = {name: label for label, name in enumerate(classes)}
  path = os.path.join(root, folder) if folder else root
  subfolders = _subfolders(path)
  if not subfolders and table is not None:  # `_folders_of_splits` returns a folder without classes only where there is a table
    return _scan_flat(path, folder, labels_by_class, table, progress, suffixes)
  unknown = [name for name in subfolders if name not in labels_by_class]
  if unknown:
    raise DataError(f"{path}/{unknown[0]} is a class that train/ has not ({len(unknown)} of {len(subfolders)} classes)")
  if len(subfolders) >= 100:
    progress(f"listing the {len(subfolders):,} class folders of {path}")
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    listed = list(pool.map(lambda name: _images(os.path.join(path, name), suffixes), subfolders))
  skipped = [entry.name for entry in _entries(path) if not _is(entry.is_dir)]
  skipped += [f"{name}/{file}" for name, (_, others) in zip(subfolders, listed, strict=True) for file in others]
  _say_skipped(path, skipped, progress)
  for name, (images, others) in zip(subfolders, listed, strict=True):
    if not images:
      raise DataError(
        f"the class {path}/{name} has no images: it is empty, or has {len(others):,} others than {' '.join(suffixes)} "
        "(config.data.formats); remove it, or add its images"
      )
  names = [os.path.join(name, file) for name, (images, _) in zip(subfolders, listed, strict=True) for file in images]
  labels = np.asarray([labels_by_class[name] for name in subfolders], np.int32)
  return _Listing(folder, names, np.repeat(labels, [len(images) for images, _ in listed]))


def _scan_flat(
  path: str, folder: str, labels_by_class: dict[str, int], table: str, progress: Callable[[str], None], suffixes: tuple[str, ...]
) -> _Listing:
  """Lists the images of a folder without class folders, sorted by name; `table` has their classes."""
  files, skipped = _images(path, suffixes)
  _say_skipped(path, [name for name in skipped if name != SOLUTION], progress)
  labels_by_image = _read_table(table, labels_by_class)
  images = [os.path.splitext(file)[0] for file in files]
  missing = [file for file, image in zip(files, images, strict=True) if image not in labels_by_image]
  if missing:
    raise DataError(f"{table} has no line for {path}/{missing[0]} ({len(missing):,} of {len(files):,} images lack one)")
  return _Listing(folder, files, np.asarray([labels_by_image[image] for image in images], np.int32))


def _say_skipped(path: str, skipped: list[str], progress: Callable[[str], None]) -> None:
  """Says in one line how much below a folder is no image, if anything is."""
  if skipped:
    progress(
      printable(
        f"{len(skipped):,} of what is in {path} is skipped, because it is no file, or none whose name ends as images of "
        f"config.data.formats do; the first: {skipped[0]}"
      )
    )


def _read_table(path: str, labels_by_class: dict[str, int]) -> dict[str, int]:
  """Reads Kaggle's table of the flat val/: the label of each image, by its name without suffix."""
  try:
    text = read_regular(path, _LARGEST_TABLE).decode()
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
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


def _is(kind: Callable[[], bool]) -> bool:
  """Returns what `entry.is_file` or `entry.is_dir` says; a link that leads round in a circle is neither."""
  try:
    return kind()
  except OSError:
    return False


def _subfolders(path: str) -> list[str]:
  """The names of the folders in a directory, sorted by name; those of ImageNet-V2 and its like, 0, 1, 2, …, by number."""
  names = [entry.name for entry in _entries(path) if _is(entry.is_dir)]
  numbered = {*names} == {str(number) for number in range(len(names))}
  return [str(number) for number in range(len(names))] if numbered else names


def _images(path: str, suffixes: tuple[str, ...]) -> _Images:
  """Lists the images directly in a folder: regular files, and links to some, whose names end in one of the suffixes."""
  images = _Images([], [])
  for entry in _entries(path):
    (images.files if entry.name.lower().endswith(suffixes) and _is(entry.is_file) else images.skipped).append(entry.name)
  return images


def _listing(path: str) -> str:
  """Returns the first names in a directory, for messages."""
  return ", ".join(entry.name for entry in _entries(path)[:10]) or "nothing"
