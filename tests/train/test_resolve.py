"""What a configuration leaves open: the sizes of images, in training and evaluation, and which crops go together."""

import pytest

from nfnets import models
from nfnets.config import Config, DataConfig, ModelConfig
from nfnets.errors import UserError
from nfnets.train import resolve


def sizes(**data) -> tuple[int | None, int | None]:
  """(training size, test size) of NFNet-F0 with these fields of the data section."""
  filled = resolve.data_config(Config(model=ModelConfig(name="nfnet_f0"), data=DataConfig(**data)))
  return filled.image_size, filled.test_image_size


def test_images_are_tested_at_the_size_that_is_given_for_training_unless_another_is():
  variant = models.variant("nfnet_f0")
  resized = {"train_crop": "inception", "test_crop": "squash"}
  assert sizes(**resized) == (variant.train_resolution, variant.test_resolution) == (192, 256)
  assert sizes(**resized, image_size=64) == (64, 64)
  assert sizes(**resized, image_size=64, test_image_size=80) == (64, 80)
  assert sizes(**resized, test_image_size=80) == (192, 80)
  assert sizes() == (None, None)


def test_resized_training_images_need_a_test_crop_or_the_size_that_all_are_stored_in():
  with pytest.raises(UserError, match=r"train_crop='inception' with test_crop='none': .*test_crop=squash, crop or short_side"):
    sizes(train_crop="inception")
  assert sizes(train_crop="inception", image_size=32, test_image_size=32) == (32, 32)
