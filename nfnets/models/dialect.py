"""The two dialects of timm (its models/nfnet.py, 1.0), beside the release's; the field `dialect` of a row names one.

| | weights are divided by | gamma | padding | in a block's skip gain's place |
|-|-|-|-|-|
| "official" | sqrt(max(var · fan_in, 1e-4)) | in the activation | XLA's SAME | a scalar, at first 0 |
| "timm_dm", its dm_nfnet_* | sqrt((var + 1e-5) · fan_in) | in the activation | XLA's SAME | a scalar, at first 0 |
| "timm", its other networks | sqrt((var + 1e-5) · fan_in) | in the weights | PyTorch's | conv2's gain, at first 0 |

"timm" also rounds channels to multiples of 8, and averages 2×2 pixels in the shortcut of every block that strides. GELU is by the
error function in both, which the rows say with activation="gelu_erf".
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from nfnets.models import activations, layers

Dialect = Literal["official", "timm", "timm_dm"]


class TimmWSConv(layers.WSConv):
  """timm's ScaledStdConv2d, which can fold gamma into the weight, adds eps to the variance, and pads as PyTorch does:

  W' = gamma · gain · (W - mean(W)) / sqrt((var(W) + 1e-5) · fan_in)
  """

  def __init__(self, *args, gamma: float, padding: layers.Padding = "SYMMETRIC", **conv):
    super().__init__(*args, padding=padding, **conv)
    self.gamma = gamma

  def standardize(self) -> layers.Array:
    return _standardize(self.kernel[...], self.gain[...], self.gamma)


@jax.jit  # so that it is traced once for each shape
def _standardize(kernel: layers.Array, gain: layers.Array, gamma: float) -> layers.Array:
  kernel = kernel.astype(jnp.float32)
  fan_in = math.prod(kernel.shape[:-1])
  mean, var = layers.moments(kernel)
  scale = jax.lax.rsqrt((var + 1e-5) * fan_in) * (gamma * gain)
  return (kernel - mean) * scale


def parts(dialect: Dialect, activation: str) -> tuple[activations.Activation, Callable[..., layers.WSConv]]:
  """Returns the activation and the class of convolutions."""
  act = activations.ACTIVATIONS[activation]
  if dialect == "timm":
    return act.without_gamma(), functools.partial(TimmWSConv, gamma=act.gamma)
  if dialect == "timm_dm":
    return act, functools.partial(TimmWSConv, gamma=1.0, padding="SAME")
  return act, layers.WSConv


def channels(dialect: Dialect, count: float, *, least: float = 0.9) -> int:
  """Returns a whole number of channels; "timm" rounds to a multiple of 8, upwards where less than `least` would be left."""
  if dialect != "timm":
    return max(1, int(count))
  rounded = max(8, int(count + 4) // 8 * 8)
  return rounded + 8 if rounded < least * count else rounded


def gate_channels(dialect: Dialect, count: float) -> int:
  """Returns the hidden features of squeeze-and-excite, which timm rounds to the nearest multiple of 8."""
  return channels(dialect, count, least=0.0)
