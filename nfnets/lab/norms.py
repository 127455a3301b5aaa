"""Normalizers, and what stands in their place, as one field `norm=` of the purpose-made networks of this room.

A name is a row of NORMS, where some take a number behind a colon: "group:8" has eight groups, "ghost:16" normalizes 16 images at
once, "lp:inf" divides by the largest deviation. Normalizers are those of nfnets.models.norms. They use the statistics of the
images at hand, and move their running ones, until `network.set_attributes(uses_running_statistics=True)` lets them use these.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from nfnets.models import activations, layers, norms as models_norms

Array = jax.Array
EPSILON = models_norms.EPSILON
UnknownNormError = models_norms.UnknownNormError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
  """What a name stands for."""

  # makes what acts on activations before each nonlinearity: (features, number, keys) → module(x, key); None: nothing does
  activations: Callable[[int, str, Any], nnx.Module] | None = None
  # how kernels are made
  weights: Literal["plain", "weight_norm", "standardized", "scaled_standardized"] = "plain"
  # how residual branches are scaled
  branch: Literal["plain", "skip_init", "skip_init_root", "fixup", "alpha_beta"] = "plain"
  # whether the nonlinearity has its gamma, which keeps a variance of 1
  gamma: bool = False


# ---- what acts on activations, x: [batch, height, width, channels]
class Normalizer(nnx.Module):
  """A normalizer of nfnets.models.norms; with `uses_running_statistics` set it uses its own, where it has some."""

  def __init__(self, norm: nnx.Module | None):
    self.norm, self.uses_running_statistics = norm, False

  def __call__(self, x: Array, key: Array | None) -> Array:
    return models_norms.normalize(self.norm, x, not self.uses_running_statistics, key)


def _of_models(name: str) -> Callable[[int, str, Any], nnx.Module]:
  """Makes the normalizer of that name of nfnets.models.norms."""
  join = lambda number: f"{name}:{number}" if number else name
  return lambda features, number, keys: Normalizer(models_norms.make_norm(join(number), features, dtype=jnp.float32, rngs=keys))


def _uncentred(features: int, number: str, keys: Any) -> nnx.Module:
  return Normalizer(nnx.RMSNorm(features, epsilon=EPSILON, feature_axes=-1, reduction_axes=(0, 1, 2), rngs=keys))


# ---- convolutions whose images are closed to a ring, so that every pixel has as many neighbours as theory says
class Ring(layers.Conv):
  """A convolution over images closed to a ring, with the kernel that the class beside it makes."""

  def __call__(self, x: Array) -> Array:
    out = convolve_ring(x, self.weight())
    return out if self.bias is None else out + self.bias[...]


class Conv(Ring):
  """A kernel as it is, as `conv` draws it."""


class WeightNormConv(Ring, models_norms.WeightNormConv):
  """Weight normalization; flax 0.12's nnx.WeightNorm keeps the gain as an array that is no nnx.Param, and so never trains it."""


class WeightStdConv(Ring, models_norms.WeightStdConv):
  """Weight standardization, variance 1."""


class WSConv(Ring, layers.WSConv):
  """Scaled weight standardization, variance 1 / fan_in."""


def convolve_ring(x: Array, kernel: Array) -> Array:
  """Convolves [B, H, W, I] with [k, k, I, O], k odd, where the first pixel follows the last one; [B, H, W, O].

  It is one matrix product over shifted copies: XLA's own convolution is many times slower on CPUs for so few channels, above all
  its gradient.
  """
  border = (kernel.shape[0] - 1) // 2
  shifts = range(border, -border - 1, -1)
  shifted = [jnp.roll(x, (down, right), axis=(1, 2)) for down in shifts for right in shifts]
  patches = jnp.concatenate(shifted, axis=-1) if border else x
  return patches @ kernel.reshape(-1, kernel.shape[-1])


# ---- the table
NORMS = {
  "none": Norm(),
  "batch": Norm(activations=_of_models("batch")),
  "batch_uncentred": Norm(activations=_uncentred),  # divides by the root mean square alone (Daneshmand et al. 2020, 2021)
  "noisy_batch": Norm(activations=_of_models("noisy_batch")),
  "ghost": Norm(activations=_of_models("ghost")),
  "layer": Norm(activations=_of_models("layer")),  # over height, width and channels
  "instance": Norm(activations=lambda features, _, keys: Normalizer(nnx.InstanceNorm(features, epsilon=EPSILON, rngs=keys))),
  "group": Norm(activations=_of_models("group")),
  "lp": Norm(activations=_of_models("lp")),
  "dyt": Norm(activations=_of_models("dyt")),
  "derf": Norm(activations=_of_models("derf")),
  "weight_norm": Norm(weights="weight_norm"),
  "weight_std": Norm(weights="standardized"),
  "scaled_weight_std": Norm(weights="scaled_standardized", gamma=True),
  "skipinit": Norm(branch="skip_init"),  # branches are multiplied by a parameter that begins at 0 (De & Smith 2020)
  "skipinit_root": Norm(branch="skip_init_root"),  # at 1 / sqrt(blocks)
  "fixup": Norm(branch="fixup"),
  "nf": Norm(weights="scaled_standardized", branch="alpha_beta", gamma=True),
  "nf_without_ws": Norm(branch="alpha_beta", gamma=True),  # shows what weight standardization is for
}


def lookup(norm: str) -> tuple[Norm, str]:
  """The row that a name stands for, and the number behind its colon; raises UnknownNormError."""
  name, colon, _ = norm.partition(":")
  row = NORMS.get(name)
  if row is None or (colon and name not in models_norms.NUMBERS):
    raise UnknownNormError(f"norm={norm!r}: expected one of {', '.join(NORMS)}, some with a number as in nfnets.models.norms")
  return row, models_norms.parse(norm)[1] if name in models_norms.NUMBERS else ""


def make(norm: str, features: int, keys: Any) -> nnx.Module | None:
  """What acts on activations of `features` channels, called as module(x, key); None where nothing does."""
  row, number = lookup(norm)
  return None if row.activations is None else row.activations(features, number, keys)


def normalize(module: nnx.Module | None, x: Array, key: Array | None) -> Array:
  """Applies what `make` made; the key is for noise."""
  apply: Any = module
  return x if apply is None else apply(x, key)


def activation(norm: str, name: str) -> activations.Activation:
  """The nonlinearity, with its gamma where `norm` relies on it."""
  function = activations.ACTIVATIONS[name]
  return function if lookup(norm)[0].gamma else function.without_gamma()


def conv(norm: str, in_features: int, out_features: int, size: int, *, act: str, factor: float = 1.0, keys: Any) -> nnx.Module:
  """Makes a convolution with the kernels that `norm` wants.

  Args:
    norm: the name.
    in_features, out_features, size: channels and the side of the kernel.
    act: the nonlinearity before it; "relu" doubles the variance of plain kernels, which keeps the mean square. Where the
      nonlinearity has its gamma, it does not, and they are N(0, 1 / fan_in).
    factor: by which plain kernels are multiplied at the start.
    keys: of the parameters. There is a bias, zero at the start, where no normalizer brings one and Fixup has none of its own.
  """
  row, _ = lookup(norm)
  gain = 2.0 if row.weights in ("plain", "weight_norm") and act == "relu" and not row.gamma else 1.0
  std = (gain * factor**2 / (size * size * in_features)) ** 0.5
  # The same numbers as drawn in their shape, which takes XLA longer to compile on CPUs with each axis, ten times with five.
  init = lambda key, shape: (jax.random.normal(key, (math.prod(shape),)) * std).reshape(shape)
  bias = row.activations is None and row.branch != "fixup"
  return CONVS[row.weights](in_features, out_features, size, use_bias=bias, kernel_init=init, rngs=keys)


CONVS: dict[str, Callable[..., nnx.Module]] = {
  "plain": Conv,
  "weight_norm": WeightNormConv,
  "standardized": WeightStdConv,
  "scaled_standardized": WSConv,
}
