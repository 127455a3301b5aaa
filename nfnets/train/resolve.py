"""What a configuration leaves open and the model's variant decides: image sizes and the strength of RandAugment."""

import dataclasses
from typing import Any

from nfnets import models
from nfnets.config import Config, DataConfig


def data_config(config: Config) -> DataConfig:
  """`config.data` with image sizes and RandAugment filled in from the variant's row; never stored, so never stale.

  Sizes stay None where images are taken as they are stored.
  """
  data, variant = config.data, models.variant(config.model.name, **config.model.all_overrides())
  filled: dict[str, Any] = {}
  if data.image_size is None and data.train_crop != "none":
    filled["image_size"] = variant.train_resolution
  if data.test_image_size is None and data.test_crop != "none":
    filled["test_image_size"] = variant.test_resolution
  if data.augment == "randaugment" and hasattr(variant, "randaugment"):
    layers, magnitude = variant.randaugment
    filled["randaugment_layers"] = data.randaugment_layers or layers
    filled["randaugment_magnitude"] = magnitude if data.randaugment_magnitude is None else data.randaugment_magnitude
  return dataclasses.replace(data, **filled)
