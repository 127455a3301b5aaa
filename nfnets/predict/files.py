"""Finds the photographs that a person names: files, folders, patterns."""

import glob
import os
import pathlib
from collections.abc import Iterable, Sequence

from nfnets.data.sources.folder import SUFFIXES


def find_photos(names: Iterable[str], formats: Sequence[str]) -> list[str]:
  """Lists the files that names mean, in their order.

  Args:
    names: of files, whatever they are called; of folders, whose images are taken with those in the folders below, sorted, without
      hidden ones; or patterns such as "photos/**/*.jpg". What is none of these stays in the list: reading it will fail.
    formats: Pillow's names of the formats whose files a folder's images are.
  """
  suffixes = tuple(suffix for name in formats for suffix in SUFFIXES[name])
  photos: list[str] = []
  for name in names:
    if os.path.isdir(name):
      photos += _below(name, suffixes) or [name]
    elif not os.path.lexists(name) and glob.has_magic(name):
      photos += sorted(path for path in glob.glob(name, recursive=True) if not os.path.isdir(path)) or [name]
    else:
      photos.append(name)
  return photos


def _below(directory: str, suffixes: tuple[str, ...]) -> list[str]:
  """The images in a folder and in those below it; links to folders are not followed, since they may lead round in a circle."""
  paths = []
  for root, folders, files in os.walk(directory):
    folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
    images = (file for file in sorted(files) if not file.startswith(".") and file.lower().endswith(suffixes))
    paths += [str(pathlib.Path(root, file)) for file in images]
  return paths
