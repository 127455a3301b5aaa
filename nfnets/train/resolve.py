"""What a configuration leaves open and the model's variant decides: image sizes and the strength of RandAugment."""

import dataclasses
from typing import Any

from nfnets import models
from nfnets.config import Config, DataConfig
from nfnets.errors import UserError
from nfnets.weights.stored import Stored

LARGEST_SIDE = 4096  # pixels of the images that weights or a checkpoint, which may be anyone's, may ask for by themselves


def data_config(config: Config) -> DataConfig:
  """Returns `config.data` with image sizes and RandAugment filled in from the variant's row; never stored, so never stale.

  Sizes stay None where images are taken as they are stored. Where only the training size is given, images are tested at that size
  too, not at the variant's, which belongs to the variant's own training size.

  Raises:
    UserError: images of any size are to be trained on, but tested as they are stored.
  """
  data, variant = config.data, models.variant(config.model.name, **config.model.all_overrides())
  filled: dict[str, Any] = {}
  if data.image_size is None and data.train_crop != "none":
    filled["image_size"] = variant.train_resolution
  if data.test_image_size is None and data.test_crop != "none":
    filled["test_image_size"] = data.image_size or variant.test_resolution
  if data.train_crop != "none" and data.test_crop == "none" and data.test_image_size is None:
    raise UserError(
      f"config.data.train_crop={data.train_crop!r} with test_crop='none': images that must be resized to be trained on cannot be "
      "tested as they are stored; expected config.data.test_crop=squash, crop or short_side (or, where all images are stored in "
      "one size, that size as config.data.test_image_size)"
    )
  if data.augment == "randaugment" and hasattr(variant, "randaugment"):
    layers, magnitude = variant.randaugment
    filled["randaugment_layers"] = data.randaugment_layers or layers
    filled["randaugment_magnitude"] = magnitude if data.randaugment_magnitude is None else data.randaugment_magnitude
  return dataclasses.replace(data, **filled)


def preprocessing(stored: Stored) -> DataConfig:
  """What turns a photograph into the network's input at an evaluation: its test_… fields, mean and std."""
  return stored.preprocessing or data_config(stored.config)
