"""Mixup and cutmix follow the release's boxes and formulas."""

import numpy as np
import pytest

from nfnets.data.images import mix
from tests import golden


def pair(height: int = 13, width: int = 21) -> tuple[np.ndarray, np.ndarray]:
  images = np.random.default_rng(3).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
  images.setflags(write=False)
  return images[0], images[1]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.37, 0.5, 0.999, 1.0])
def test_mixup_rounds_the_weighted_sum(ratio):
  image, partner = pair()
  mixed = mix.mixup(image, partner, ratio)
  assert mixed.dtype == np.uint8 and mixed.shape == image.shape and mixed.flags.c_contiguous
  exact = ratio * image.astype(np.float64) + (1 - ratio) * partner
  assert np.abs(mixed - exact).max() <= 0.5 + 1e-4
  if ratio in (0, 1):
    np.testing.assert_array_equal(mixed, image if ratio else partner)


@pytest.mark.parametrize("row", golden.load("augment")["cutmix"], ids=lambda row: f"{row[0]:.0f}x{row[1]:.0f}-{row[4]:.3f}")
def test_a_box_is_the_one_of_the_release(row):
  height, width, y, x = (int(entry) for entry in row[:4])
  top, left, bottom, right = box = mix.box_around(height, width, y, x, row[4])
  if row[9] == 0:
    assert (bottom - top) * (right - left) == 0
  else:
    assert box == tuple(row[5:9].astype(int))
  image, partner = np.full((height, width, 3), 200, np.uint8), np.zeros((height, width, 3), np.uint8)
  mixed, ratio = mix.cutmix(image, partner, box)
  assert ratio == pytest.approx(row[9], rel=1e-5) and isinstance(ratio, float)
  assert (mixed == 200).mean() == pytest.approx(ratio)


def test_cutmix_keeps_the_image_inside():
  image, partner = pair()
  mixed, ratio = mix.cutmix(image, partner, (2, 3, 7, 20))
  np.testing.assert_array_equal(mixed[2:7, 3:20], image[2:7, 3:20])
  outside = np.ones(image.shape[:2], bool)
  outside[2:7, 3:20] = False
  np.testing.assert_array_equal(mixed[outside], partner[outside])
  assert ratio == 5 * 17 / (13 * 21) and mixed.dtype == np.uint8 and mixed.flags.c_contiguous and mixed.flags.writeable


def test_boxes_are_inside_the_image_and_functions_of_the_generator():
  boxes = [mix.cutmix_box(30, 50, np.random.default_rng(seed)) for seed in range(2000)]
  assert boxes == [mix.cutmix_box(30, 50, np.random.default_rng(seed)) for seed in range(2000)]
  top, left, bottom, right = np.array(boxes).T
  assert (top >= 0).all() and (left >= 0).all() and (bottom <= 30).all() and (right <= 50).all()
  assert (top <= bottom).all() and (left <= right).all()
  share = (bottom - top) * (right - left) / 1500
  # Boxes inside the image would have the mean 0.5; clipping leaves the mean of (s (1 - s/4))², where s² is uniform.
  s = np.sqrt((np.arange(1000) + 0.5) / 1000)
  assert share.mean() == pytest.approx(np.mean((s * (1 - s / 4)) ** 2), abs=0.03)
  assert min(top) == 0 and min(left) == 0 and max(bottom) == 30 and max(right) == 50


@pytest.mark.parametrize("size", [1, 2, 3])
def test_cutmix_accepts_tiny_images(size):
  rng = np.random.default_rng(0)
  image, partner = pair(size, size)
  for _ in range(50):
    mixed, ratio = mix.cutmix(image, partner, mix.cutmix_box(size, size, rng))
    assert mixed.shape == image.shape and 0 <= ratio <= 1


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0])
def test_the_ratio_has_the_moments_of_the_beta_distribution(alpha):
  rng = np.random.default_rng(0)
  ratios = np.array([mix.mixup_ratio(rng, alpha) for _ in range(4000)])
  assert ratios.min() >= 0 and ratios.max() <= 1
  assert ratios.mean() == pytest.approx(0.5, abs=0.03)
  assert ratios.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.01)


def test_images_of_different_shapes_or_types_are_refused():
  image, partner = pair()
  for other in (partner[:-1], partner.astype(np.float32)):
    with pytest.raises(ValueError, match="cannot mix uint8"):
      mix.mixup(image, other, 0.5)
    with pytest.raises(ValueError, match="cannot mix uint8"):
      mix.cutmix(image, other, (0, 0, 1, 1))
