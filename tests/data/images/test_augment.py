"""Augmentation gives the release's own pixels, accepts images of every size, and depends on the generator alone."""

import concurrent.futures

import chex
import numpy as np
import pytest

from nfnets.data.images import augment, operations
from tests import golden

GOLDEN = golden.load("augment")
CASES = [key for key in GOLDEN if key.startswith(("photo/", "low/"))]
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
SHAPES = [(1, 1), (1, 7), (2, 3), (3, 2), (5, 1), (17, 31), (64, 48)]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


class Fixed:
  """A generator that picks `index`, applies every operation of a probability above 0, and makes every argument positive."""

  def __init__(self, index: int):
    self.index = index

  def integers(self, *_, **__):
    return self.index

  def random(self, shape):
    return np.zeros(shape)


@pytest.mark.parametrize("case", CASES)
def test_an_operation_gives_the_pixels_of_the_release(case):
  kind, name, level, drawn = case.split("/")
  image, operation = GOLDEN[f"image/{kind}"], augment.OPERATIONS[name]
  if operation.draw == "centre":
    reach = operation.argument(float(level), augment.RANDAUGMENT_REACH)
    got = operation.function(image, reach, *(int(entry) for entry in drawn.split(",")))
  else:
    got = operation.apply(image, float(level), 0 if int(drawn) > 0 else 0.9, 0, augment.RANDAUGMENT_REACH)
  differences = np.abs(got.astype(int) - GOLDEN[case])
  if name == "Rotate":  # a sine that differs in the last bit can make the other of two pixels the nearest
    assert differences.mean() < 0.1, f"{np.count_nonzero(differences)} values differ"
  else:
    np.testing.assert_array_equal(got, GOLDEN[case])


def test_golden_has_every_operation_and_both_signs():
  assert {case.split("/")[1] for case in CASES} == set(augment.OPERATIONS)
  for name in GEOMETRIC:
    assert augment.OPERATIONS[name].draw == "sign"
    assert {case[-2:] for case in CASES if f"/{name}/" in case} == {"/1", "-1"}


@pytest.mark.parametrize("index", range(25))
def test_every_pair_of_the_policy_gives_the_pixels_of_the_release(index):
  got = augment.autoaugment(GOLDEN["image/small"], Fixed(index))
  assert np.abs(got.astype(int) - GOLDEN[f"policy/{index}"]).mean() < 0.1


def test_the_policy_has_the_probabilities_and_levels_of_the_release():
  ours = [", ".join(f"{name} {probability} {level}" for name, probability, level in pair) for pair in augment.POLICY_V0]
  assert ours == GOLDEN["policy"].tolist()


@pytest.mark.parametrize("name", augment.OPERATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operations_accept_every_size_and_level(name, shape):
  image = picture(*shape)
  before = image.copy()
  for level in (0, 2.5, 5, 10, 15, 22.5, 30):
    for reach in (augment.RANDAUGMENT_REACH, augment.AUTOAUGMENT_REACH):
      got = augment.OPERATIONS[name](image, level, np.random.default_rng(1), reach)
      assert got.dtype == np.uint8 and got.shape == image.shape and got.flags.c_contiguous
  np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operations_accept_read_only_images(name):
  image = picture(20, 24)
  expected = augment.OPERATIONS[name](image.copy(), 10, np.random.default_rng(0))
  image.setflags(write=False)
  np.testing.assert_array_equal(augment.OPERATIONS[name](image, 10, np.random.default_rng(0)), expected)


@pytest.mark.parametrize("value", [0, 90, 255])
def test_flat_images_stay_flat(value):
  """No division by an empty range or step."""
  image = np.full((20, 30, 3), value, np.uint8)
  np.testing.assert_array_equal(operations.autocontrast(image), image)
  np.testing.assert_array_equal(operations.equalize(image), image)


def test_geometric_operations_move_pixels_as_slices_do():
  image = picture(6, 8)
  np.testing.assert_array_equal(operations.translate_x(image, 3)[:, :5], image[:, 3:])
  assert (operations.translate_x(image, 3)[:, 5:] == operations.GREY).all()
  np.testing.assert_array_equal(operations.translate_y(image, -2)[2:], image[:-2])
  assert (operations.translate_y(image, 6) == operations.GREY).all()
  np.testing.assert_array_equal(operations.rotate(image, 180), image[::-1, ::-1])
  square = picture(7, 7)
  np.testing.assert_array_equal(operations.rotate(square, 90), np.rot90(square))
  np.testing.assert_array_equal(operations.shear_x(image, 1)[2, :6], image[2, 2:])
  np.testing.assert_array_equal(operations.shear_y(image, -1)[3:, 3], image[:3, 3])


def test_cutout_is_clipped():
  image = np.zeros((10, 12, 3), np.uint8)
  grey = (operations.cutout(image, 3, 1, 11) == operations.GREY).all(axis=-1)
  assert grey[:4, 8:].all() and grey.sum() == 16
  assert (operations.cutout(image, 0, 5, 5) == 0).all()


def test_levels_beyond_a_byte_wrap_as_in_the_release():
  image = picture(9, 9)
  np.testing.assert_array_equal(operations.solarize(image, 256), operations.invert(image))
  np.testing.assert_array_equal(operations.solarize(image, 384), operations.solarize(image, 128))
  np.testing.assert_array_equal(operations.posterize(image, 9), image & 0x80)
  np.testing.assert_array_equal(operations.posterize(image, 0), image & 0x80)


def test_contrast_blends_with_a_grey_that_depends_on_the_number_of_pixels():
  for side, grey in ((192, 144), (224, 196), (320, 255)):
    image = np.full((side, side, 3), 10, np.uint8)
    assert (operations.contrast(image, 0.5) == (10 + grey) // 2).all()


@pytest.mark.parametrize(
  "policy",
  [lambda image, rng: augment.randaugment(image, rng, layers=4, magnitude=15), augment.autoaugment],
  ids=["randaugment", "autoaugment"],
)
def test_policies_are_functions_of_the_generator_alone(policy):
  image = picture(40, 56)
  before = image.copy()
  serial = [policy(image, np.random.default_rng(seed)) for seed in range(60)]
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    parallel = list(pool.map(lambda seed: policy(image, np.random.default_rng(seed)), reversed(range(60))))
  chex.assert_trees_all_equal(serial, parallel[::-1])
  for augmented in serial:
    assert augmented.dtype == np.uint8 and augmented.shape == image.shape and augmented.flags.c_contiguous
  assert len({augmented.tobytes() for augmented in serial}) > 15
  np.testing.assert_array_equal(image, before)
  # A view with negative strides gives what the contiguous image gives.
  view = np.ascontiguousarray(image[::-1])[::-1]
  np.testing.assert_array_equal(policy(view, np.random.default_rng(7)), serial[7])


def test_every_operation_and_both_signs_are_drawn(monkeypatch):
  calls = {name: [] for name in augment.OPERATIONS}

  def recorder(name):
    def record(image, *arguments):
      calls[name].append(arguments)
      return image

    return record

  for name, operation in augment.OPERATIONS.items():
    monkeypatch.setitem(augment.OPERATIONS, name, operation._replace(function=recorder(name)))
  rng, image = np.random.default_rng(0), picture(30, 50)
  for _ in range(1600):
    augment.randaugment(image, rng, layers=2, magnitude=9)
  counts = np.array([len(arguments) for arguments in calls.values()])
  assert counts.sum() == 3200
  assert ((counts - 200) ** 2 / 200).sum() < 37.7  # chi-squared, 15 degrees of freedom, 0.1%
  for name in GEOMETRIC:
    positive = np.mean([arguments[0] > 0 for arguments in calls[name]])
    assert 0.36 < positive < 0.64 and len({arguments[0] for arguments in calls[name]}) == 2
  _, rows, columns = np.array(calls["Cutout"]).T
  assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 29, 0, 49)


@pytest.mark.parametrize(
  "image",
  [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8)],
  ids=lambda image: f"{image.dtype}{image.shape}",
)
def test_images_of_another_type_are_refused(image):
  with pytest.raises(ValueError, match="expected uint8"):
    augment.randaugment(image, np.random.default_rng(0), layers=1, magnitude=5)
  with pytest.raises(ValueError, match="expected uint8"):
    augment.autoaugment(image, np.random.default_rng(0))
