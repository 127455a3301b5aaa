"""RandAugment and AutoAugment on the host, on uint8 images [height, width, 3], RGB.

The 16 operations and their levels are those of the NFNet release (google-deepmind/deepmind-research,
nfnets/autoaugment.py). No function here modifies its input, and all are thread-safe.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nfnets.data.images import operations

_MAX_LEVEL = 10


class Reach(NamedTuple):
  """How far, in pixels, level 10 cuts out (half the side of the square) and translates."""

  cutout: int
  translate: int


RANDAUGMENT_REACH = Reach(cutout=40, translate=100)
AUTOAUGMENT_REACH = Reach(cutout=100, translate=250)


# ---- operations at a level


class Operation(NamedTuple):
  """An operation of `operations` together with the meaning of a level.

  function: called with the image and, if `argument` is set, with argument(level, reach). draw: what is random; "sign" makes
  the argument negative in half of all cases, "centre" appends a row and a column, and "" draws nothing.
  """

  function: Callable[..., np.ndarray]
  argument: Callable[[float, Reach], float] | None = None
  draw: str = ""

  def __call__(self, image: np.ndarray, level: float, rng: np.random.Generator, reach: Reach = RANDAUGMENT_REACH) -> np.ndarray:
    """Applies the operation at `level`, of a scale that ends at 10 (RandAugment goes to 30), to uint8 [height, width, 3]."""
    return self.apply(image, level, rng.random(), rng.random(), reach)

  def apply(self, image: np.ndarray, level: float, first: float, second: float, reach: Reach) -> np.ndarray:
    """Applies the operation with two numbers drawn from [0, 1), of which it may use none."""
    if self.argument is None:
      return self.function(image)
    argument = self.argument(level, reach)
    if self.draw == "sign":
      return self.function(image, argument if first < 0.5 else -argument)
    if self.draw == "centre":
      return self.function(image, argument, int(first * image.shape[0]), int(second * image.shape[1]))
    return self.function(image, argument)


def _enhance(level: float, _: Reach) -> float:
  return level / _MAX_LEVEL * 1.8 + 0.1


def _slope(level: float, _: Reach) -> float:
  return level / _MAX_LEVEL * 0.3


def _distance(level: float, reach: Reach) -> float:
  return level / _MAX_LEVEL * reach.translate


OPERATIONS: dict[str, Operation] = {
  "AutoContrast": Operation(operations.autocontrast),
  "Equalize": Operation(operations.equalize),
  "Invert": Operation(operations.invert),
  "Rotate": Operation(operations.rotate, lambda level, _: level / _MAX_LEVEL * 30, "sign"),
  "Posterize": Operation(operations.posterize, lambda level, _: int(level / _MAX_LEVEL * 4)),
  "Solarize": Operation(operations.solarize, lambda level, _: int(level / _MAX_LEVEL * 256)),
  "SolarizeAdd": Operation(operations.solarize_add, lambda level, _: int(level / _MAX_LEVEL * 110)),
  "Color": Operation(operations.color, _enhance),
  "Contrast": Operation(operations.contrast, _enhance),
  "Brightness": Operation(operations.brightness, _enhance),
  "Sharpness": Operation(operations.sharpness, _enhance),
  "ShearX": Operation(operations.shear_x, _slope, "sign"),
  "ShearY": Operation(operations.shear_y, _slope, "sign"),
  "TranslateX": Operation(operations.translate_x, _distance, "sign"),
  "TranslateY": Operation(operations.translate_y, _distance, "sign"),
  "Cutout": Operation(operations.cutout, lambda level, reach: int(level / _MAX_LEVEL * reach.cutout), "centre"),
}
_NAMES = tuple(OPERATIONS)


# ---- the two policies

# AutoAugment's ImageNet policy (1805.09501), as in the release's policy_v0: pairs of operation, probability in tenths, level.
_POLICY_V0 = """
Equalize 8 1, ShearY 8 4 | Color 4 9, Equalize 6 3 | Color 4 1, Rotate 6 8 |
Solarize 8 3, Equalize 4 7 | Solarize 4 2, Solarize 6 2 | Color 2 0, Equalize 8 8 |
Equalize 4 8, SolarizeAdd 8 3 | ShearX 2 9, Rotate 6 8 | Color 6 1, Equalize 10 2 |
Invert 4 9, Rotate 6 0 | Equalize 10 9, ShearY 6 3 | Color 4 7, Equalize 6 0 |
Posterize 4 6, AutoContrast 4 7 | Solarize 6 8, Color 6 9 | Solarize 2 4, Rotate 8 9 |
Rotate 10 7, TranslateY 8 9 | ShearX 0 0, Solarize 8 4 | ShearY 8 0, Color 6 4 |
Color 10 0, Rotate 6 2 | Equalize 8 4, Equalize 0 8 | Equalize 10 4, AutoContrast 6 2 |
ShearY 4 7, SolarizeAdd 6 7 | Posterize 8 2, Solarize 6 10 | Solarize 6 8, Equalize 6 1 |
Color 8 6, Rotate 4 5
"""
POLICY_V0 = tuple(
  tuple((name, int(tenths) / 10, int(level)) for name, tenths, level in (step.split() for step in pair.split(",")))
  for pair in _POLICY_V0.split("|")
)


def randaugment(image: np.ndarray, rng: np.random.Generator, *, layers: int, magnitude: float) -> np.ndarray:
  """Applies RandAugment (1909.13719): operations drawn from all 16, one after the other.

  Args:
    image: uint8 [height, width, 3]. Anything else raises ValueError.
    rng: every call draws the same amount from it.
    layers: the number of operations.
    magnitude: the level of all of them.
  """
  image = _checked(image)
  picks = rng.integers(len(_NAMES), size=layers).tolist()
  draws = rng.random((layers, 2)).tolist()
  for pick, (first, second) in zip(picks, draws, strict=True):
    image = OPERATIONS[_NAMES[pick]].apply(image, magnitude, first, second, RANDAUGMENT_REACH)
  return image


def autoaugment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Applies AutoAugment's ImageNet policy v0 (1805.09501): a random pair of 25, each operation with its own probability.

  Args:
    image: uint8 [height, width, 3]. Anything else raises ValueError.
    rng: every call draws the same amount from it.
  """
  image = _checked(image)
  steps = POLICY_V0[int(rng.integers(len(POLICY_V0)))]
  for (name, probability, level), (chance, first, second) in zip(steps, rng.random((len(steps), 3)).tolist(), strict=True):
    if chance < probability:
      image = OPERATIONS[name].apply(image, level, first, second, AUTOAUGMENT_REACH)
  return image


def _checked(image: np.ndarray) -> np.ndarray:
  """Returns the image with contiguous memory; raises ValueError if it is not uint8 RGB."""
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
    raise ValueError(f"image is {image.dtype} {image.shape}: expected uint8 (height, width, 3), RGB, before normalization")
  return np.ascontiguousarray(image)
