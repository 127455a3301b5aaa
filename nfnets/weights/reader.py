"""Reads a file of weights, ours or another framework's, as `Stored`: our names, and the network that they belong to."""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from nfnets import models
from nfnets.config import Config, DataConfig
from nfnets.weights import card, formats, haiku, timm
from nfnets.weights.errors import WeightsError
from nfnets.weights.identify import identify
from nfnets.weights.stored import Stored, of_export


def read(path: str | os.PathLike[str]) -> Stored:
  """Reads the weights of a network from a file that `launch.checkpoint export` wrote, or one in Haiku's or timm's names.

  Raises:
    WeightsError: it cannot be read, is damaged, belongs to no network known here, or holds numbers that are not finite.
  """
  file = formats.read(path)
  if file.metadata.get("format") == "nfnets":
    stored = of_export(str(path), file.arrays, file.metadata)
  elif (network := haiku.network_of(file.arrays)) is not None:
    stored = _of_haiku(str(path), file, network)
  elif timm.is_theirs(file.arrays):
    stored = _of_timm(str(path), file)
  else:
    some = ", ".join(sorted(file.arrays)[:3])
    raise WeightsError(f"{path} has names of no framework known here, such as {some[:200]}; expected nfnets', Haiku's or timm's")
  check_finite(stored.arrays, stored.source)
  return stored


def check_finite(arrays: dict[str, np.ndarray], source: str) -> None:
  """Raises WeightsError naming the first array that holds NaN or infinity."""
  for name, array in arrays.items():
    if wrong := array.size - np.count_nonzero(np.isfinite(array)):
      raise WeightsError(f"{source}: {name} holds {wrong:,} numbers of {array.size:,} that are NaN or infinite")


def _of_haiku(source: str, file: formats.File, network: str) -> Stored:
  arrays, unknown = haiku.to_ours(file.arrays)
  _refuse(source, unknown, network)
  if file.md5 in haiku.PUBLISHED:
    source += f" (the published {haiku.PUBLISHED[file.md5]}, by its MD5 sum)"
  prefix = next(family.prefix for family in haiku.FAMILIES if family.network == network)
  names = [name for name in models.names() if name.startswith(prefix)]
  model = identify(arrays, [(name, {}) for name in names], source)
  crop = "squash" if network == "NFNet" else "crop"
  return _stored(source, arrays, Config(model=model, data=DataConfig(test_crop=crop)))


def _of_timm(source: str, file: formats.File) -> Stored:
  arrays, unknown = timm.to_ours(file.arrays)
  _refuse(source, unknown, "network of timm's")
  dm = any(name.endswith("/skip_gain") for name in arrays)
  known = [row for name, row in timm.ARCHITECTURES.items() if name.startswith("dm_") == dm]
  model = identify(arrays, [(row.name, row.overrides) for row in known], source)
  row = next(row for row in known if row.name == model.name)
  mean, std = (tuple(255 * value for value in values) for values in (row.mean, row.std))
  crop = "squash" if dm else "short_side"
  data = DataConfig(
    test_crop=crop, test_crop_pct=row.crop_pct, test_resize="pillow", test_image_size=row.test_size, mean=mean, std=std
  )
  stored = _stored(source, arrays, Config(model=model, data=data))
  data, names = card.read_config(pathlib.Path(source), data, stored.num_classes)
  return dataclasses.replace(stored, config=Config(model=model, data=data), class_names=names)


def _refuse(source: str, unknown: list[str], framework: str) -> None:
  """Raises WeightsError where names were left over."""
  if unknown:
    more = f", and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    raise WeightsError(
      f"{source}: left over, since no {framework} has them: {', '.join(name[:80] for name in unknown[:3])}{more}"
    )


def _stored(source: str, arrays: dict[str, np.ndarray], config: Config) -> Stored:
  classes: Any = arrays["fc/kernel"].shape[1]
  return Stored(source=source, arrays=arrays, config=config, num_classes=classes)
