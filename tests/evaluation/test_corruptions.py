"""The mean corruption error is what ImageNet-C's authors define."""

import pytest

from nfnets.evaluation import corruptions

ALL = {(name, level) for name in corruptions.ALEXNET for level in corruptions.SEVERITIES}


def test_alexnet_itself_has_an_mce_of_one():
  right = {(name, level): (round(1e6 * (1 - corruptions.ALEXNET[name])), 10**6) for name, level in ALL}
  measured = corruptions.measure(right, classes=1000)
  assert measured.mce == pytest.approx(1, abs=1e-5)
  assert measured.mean_error == pytest.approx(0.789, abs=1e-4)  # the mean of its published errors


def test_severities_are_averaged_before_the_ratio_is_taken():
  """CE_c = Σ_s E_s,c / Σ_s E_s,c(AlexNet) (1903.12261, section 4.1); here errors 10, 20, … 50 % for all corruptions."""
  right = {(name, level): (100 - 10 * level, 100) for name, level in ALL}
  measured = corruptions.measure(right, classes=1000)
  assert measured.ce["fog"] == pytest.approx(0.3 / 0.819324)
  assert measured.mce == pytest.approx(sum(0.3 / error for error in corruptions.ALEXNET.values()) / 15)


def test_an_mce_is_of_all_of_imagenet_c_alone():
  whole = {part: (1, 2) for part in ALL}
  some = {part: right for part, right in whole.items() if part != ("fog", 3)}
  assert corruptions.measure(some, classes=1000).mce is None and "fog" not in corruptions.measure(some, classes=1000).ce
  assert corruptions.measure(whole, classes=10).mce is None
  assert corruptions.measure({("speckle", 1): (3, 4)}, classes=1000).mean_error == 0.25
