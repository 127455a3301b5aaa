"""How images are shown to a network in an evaluation: as its weights say, unless a part of it is overridden; and which images."""

import dataclasses
import os

from nfnets.config import DataConfig
from nfnets.errors import UserError
from nfnets.train import resolve
from nfnets.weights.errors import WeightsError
from nfnets.weights.stored import Stored

# What says which images there are, and how they are read; everything else in DataConfig is the protocol's.
_WHICH = ("name", "dir", "index_dir", "train_split", "test_split", "image_key", "label_key", "num_classes", "image_size")
_READ = ("threads", "formats", "max_pixels", "max_corrupt")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
  """What is to differ from the protocol of the weights; None leaves a part to them.

  Attributes:
    resolution: side of the square images, pixels.
    crop, crop_pct, resize: values of config.data.test_crop, test_crop_pct and test_resize.
    mean, std: per channel, on the scale 0-255.
    flip: whether the logits of an image and of its mirror image are averaged.
  """

  resolution: int | None = None
  crop: str | None = None
  crop_pct: float | None = None
  resize: str | None = None
  mean: tuple[float, ...] | None = None
  std: tuple[float, ...] | None = None
  flip: bool = False


def data_config(stored: Stored, images: DataConfig | None, overrides: Overrides) -> DataConfig:
  """Returns which images are shown to the network, and how.

  Args:
    stored: the weights.
    images: which images; its crop, size, mean and std are not looked at. None takes those that the weights were trained on.
    overrides: of the protocol.

  Raises:
    WeightsError: the file of weights asks for enormous images.
    UserError: the overrides do not go together.
  """
  protocol = resolve.preprocessing(stored)
  if overrides.resolution is None and (protocol.test_image_size or 0) > resolve.LARGEST_SIDE:
    raise WeightsError(
      f"{stored.source}: its images are to have {protocol.test_image_size:,} pixels a side; "
      f"expected {resolve.LARGEST_SIDE:,} at most, or --resolution=N for another size"
    )
  images = images or stored.config.data
  changes = {name: getattr(images, name) for name in (*_WHICH, *_READ)}
  renamed = {
    "test_image_size": overrides.resolution,
    "test_crop": overrides.crop,
    "test_crop_pct": overrides.crop_pct,
    "test_resize": overrides.resize,
    "mean": overrides.mean,
    "std": overrides.std,
  }
  changes |= {name: value for name, value in renamed.items() if value is not None}
  data = dataclasses.replace(protocol, **changes)
  data.validate()
  if data.test_crop == "none" and overrides.resolution is not None:
    raise UserError(
      f"--resolution={overrides.resolution}: {stored.source} takes images as they are stored (test_crop='none'); "
      "expected --crop=squash, crop or short_side beside it"
    )
  if data.test_crop != "none" and data.test_image_size is None:
    raise UserError(f"--crop={data.test_crop}: {stored.source} says no size; expected --resolution=N beside it")
  return data


def describe(data: DataConfig, overrides: Overrides) -> str:
  """The protocol in a line, for people, with what of it was overridden."""
  share = f" {data.test_crop_pct:g}" if data.test_crop_pct else ""
  size = f"{data.test_image_size} pixels, {data.test_crop}{share}, {data.test_resize}'s bicubic"
  size = "images as they are stored" if data.test_crop == "none" else size
  changed = [field.name for field in dataclasses.fields(overrides) if getattr(overrides, field.name) not in (None, False)]
  return (
    f"{size}; mean {_numbers(data.mean)}, std {_numbers(data.std)}"
    f"{'; averaged with the mirror image' if overrides.flip else ''}"
    f"; {'overridden: ' + ', '.join(changed) if changed else 'as the weights say'}"
  )


def images_of(where: str, *, directory: str = "", split: str = "") -> DataConfig:
  """Names a data set as a person does: a folder of images, or a data set of TFDS or built in, by its name.

  Args:
    where: a directory with train/ or val/ in it, or a name such as "digits" or "imagenet_v2".
    directory: of a name, where TFDS has prepared it.
    split: a split expression; empty takes "test", or "val" of a folder.
  """
  data = DataConfig(name=where, dir=directory, test_split=split or "test")
  if os.path.isdir(os.path.expanduser(where)):
    if directory:
      raise UserError(f"--data={where} is a directory; --data_dir={directory} belongs to the name of a TFDS data set")
    data = dataclasses.replace(data, name="folder", dir=where, test_split=split or "val")
  elif os.sep in where and not directory:
    raise UserError(f"--data={where}: no such directory; expected one with train/ or val/ in it, or the name of a data set")
  data.validate()
  return data


def _numbers(values: tuple[float, ...]) -> str:
  return "/".join(f"{value:g}" for value in values)
