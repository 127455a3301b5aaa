"""Normalizers of ResNets by name, and what papers have put in their place; the field `norm` of `ResNetConfig`.

A name stands for a normalizer of activations, or for a way to make the weights of convolutions. Some take a number behind a
colon: "group:8" has eight groups of channels, "ghost:16" normalizes 16 images at once, "lp:1" divides by the mean absolute
deviation.
Statistics are float32, whatever the dtype. Running statistics move by a tenth a step; under jit over a mesh they are the global
batch's.
"""

import abc
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nfnets.errors import UserError
from nfnets.models import activations, layers

Array = jax.Array
EPSILON, MOMENTUM = 1e-5, 0.9

# name: what the number behind a colon is, "" if there is none; brackets: it may be left out
NUMBERS = {
  "batch": "",
  "noisy_batch": "",  # with noise behind it in training (Santurkar et al. 2018)
  "group": "[GROUPS]",  # 32 groups without a number
  "layer": "",  # height, width and all channels
  "instance": "",  # each channel alone
  "ghost": "IMAGES",  # batch normalization of that many images at once (Hoffer et al. 2017)
  "lp": "P",  # 1, 2 or inf: batch normalization by another deviation (Santurkar et al. 2018)
  "dyt": "",  # dynamic tanh (Zhu et al. 2025)
  "derf": "",  # scale · erf(a · x + s) + bias
  "weight_norm": "",  # Salimans and Kingma 2016
  "weight_std": "",  # Qiao et al. 2019
  "scaled_weight_std": "",  # P1, with activations that have their gamma, but without alpha and beta
  "none": "",
  # no normalizer, but branches that are scaled
  "skipinit": "",  # by a parameter that is 0 at the start (De and Smith, 2002.10444)
  "skipinit_root": "",  # by one that is 1 / sqrt(blocks) at the start
  "fixup": "",  # Fixup's scales, biases and initialisation in post-activation blocks (Zhang et al., 1901.09321)
  "nf": "",  # by alpha and beta, with scaled weight standardization: an NF-ResNet (P1)
}
ON_ACTIVATIONS = ("batch", "noisy_batch", "group", "layer", "instance", "ghost", "lp", "dyt", "derf")


class UnknownNormError(UserError):
  """No normalizer has the given name, or its number is wrong; the message lists all."""


def parse(norm: str) -> tuple[str, str]:
  """Splits "group:8" into ("group", "8"), and "batch" into ("batch", ""); raises UnknownNormError."""
  name, colon, number = str(norm).partition(":")
  takes = NUMBERS.get(name, "")
  allowed = number in ("1", "2", "inf") if name == "lp" else number.isascii() and number.isdigit() and int(number) > 0
  if name not in NUMBERS or not (takes and allowed if colon else not takes or takes.startswith("[")):
    shown = lambda name, takes: f"{name}[:{takes[1:]}" if takes[:1] == "[" else f"{name}:{takes}" if takes else name
    known = ", ".join(shown(*row) for row in NUMBERS.items())
    raise UnknownNormError(f"norm={norm!r}: expected one of {known}")
  return name, number


class NoisyBatchNorm(nnx.BatchNorm):
  """Batch normalization behind which, in training, each number is multiplied by noise, and noise is added: see `noise`."""


def noise(x: Array, key: Array) -> Array:
  """Adds the noise of Santurkar et al. 2018, section 2.2, to x [batch, height, width, channels].

  The mean and the spread of the noise are drawn for each number of an image, anew at each call, so that distributions move more
  than without any normalization. The strengths (mean within ±0.5, spread 1 to 1.25, each image ±0.1 around them) are from memory
  of the paper's appendix, not checked against it. `key` is one key, or the images' keys [batch], of which the first one is taken.
  """
  keys = jax.random.split(key[0] if key.ndim else key, 4)
  mean = jax.random.uniform(keys[0], x.shape[1:], minval=-0.5, maxval=0.5)
  spread = jax.random.uniform(keys[1], x.shape[1:], minval=1.0, maxval=1.25)
  added = mean + jax.random.uniform(keys[2], x.shape, minval=-0.1, maxval=0.1)
  return (x * (spread + 0.1 * jax.random.normal(keys[3], x.shape)) + added).astype(x.dtype)


class Affine(nnx.Module):
  """A scale of ones and a bias of zeros for each channel, applied in float32."""

  def __init__(self, features: int, dtype: Any = jnp.float32):
    self.scale, self.bias = nnx.Param(layers.full(1)(None, (features,))), nnx.Param(layers.full(0)(None, (features,)))
    self.dtype = jnp.dtype(dtype)

  def affine(self, x: Array) -> Array:
    return (x * self.scale[...] + self.bias[...]).astype(self.dtype)


class RunningNorm(Affine):
  """(x - mean) / size · scale + bias by channel, with running statistics for evaluation; subclasses say what the size is."""

  def __init__(self, features: int, dtype: Any = jnp.float32):
    super().__init__(features, dtype)
    self.mean, self.size = nnx.BatchStat(layers.full(0)(None, (features,))), nnx.BatchStat(layers.full(1)(None, (features,)))

  @abc.abstractmethod
  def normalized(self, x: Array) -> tuple[Array, Array, Array]:
    """(x normalized by its own statistics, mean [channels], size [channels]) of x, float32 [batch, height, width, channels]."""

  def __call__(self, x: Array, *, use_running_average: bool) -> Array:
    x = x.astype(jnp.float32)
    if use_running_average:
      return self.affine((x - self.mean[...]) / self.size[...])
    x, mean, size = self.normalized(x)
    self.mean[...] = MOMENTUM * self.mean[...] + (1 - MOMENTUM) * jax.lax.stop_gradient(mean)
    self.size[...] = MOMENTUM * self.size[...] + (1 - MOMENTUM) * jax.lax.stop_gradient(size)
    return self.affine(x)


class LpNorm(RunningNorm):
  """The size is (mean |x - mean|^p)^(1/p) over images and space; for p = inf, the largest deviation (Santurkar et al. 2018)."""

  def __init__(self, features: int, p: float, dtype: Any = jnp.float32):
    super().__init__(features, dtype)
    self.p = p

  def normalized(self, x: Array) -> tuple[Array, Array, Array]:
    mean = jnp.mean(x, axis=(0, 1, 2))
    x = x - mean
    if math.isinf(self.p):
      size = jnp.max(jnp.abs(x), axis=(0, 1, 2)) + EPSILON
    elif self.p == 2:
      size = jnp.sqrt(jnp.mean(x * x, axis=(0, 1, 2)) + EPSILON)
    else:
      size = jnp.mean(jnp.abs(x) ** self.p, axis=(0, 1, 2)) ** (1 / self.p) + EPSILON
    return x / size, mean, size


class GhostNorm(RunningNorm):
  """Batch normalization of each `images` images by themselves (Hoffer et al. 2017); they must divide the batch."""

  def __init__(self, features: int, images: int, dtype: Any = jnp.float32):
    super().__init__(features, dtype)
    self.images = images

  def normalized(self, x: Array) -> tuple[Array, Array, Array]:
    if x.shape[0] % self.images:
      raise UserError(f"norm='ghost:{self.images}': expected a divisor of the batch of {x.shape[0]} images")
    parts = x.reshape(-1, self.images, *x.shape[1:])
    mean = jnp.mean(parts, axis=(1, 2, 3), keepdims=True)
    variance = jnp.var(parts, axis=(1, 2, 3), keepdims=True) + EPSILON
    of_all = lambda statistic: jnp.mean(statistic, axis=(0, 1, 2, 3))
    return ((parts - mean) * jax.lax.rsqrt(variance)).reshape(x.shape), of_all(mean), jnp.sqrt(of_all(variance))


class Squash(Affine):
  """Dynamic tanh, scale · tanh(a · x) + bias with a = 0.5 at the start (Zhu et al. 2025), or Derf, with erf(a · x + s)."""

  def __init__(self, features: int, *, erf: bool, dtype: Any = jnp.float32):
    super().__init__(features, dtype)
    self.a = nnx.Param(layers.full(0.5)(None, ()))
    self.shift = nnx.Param(layers.full(0)(None, ())) if erf else None

  def __call__(self, x: Array) -> Array:
    x = x.astype(jnp.float32) * self.a[...]
    return self.affine(jnp.tanh(x) if self.shift is None else jax.lax.erf(x + self.shift[...]))


class WeightNormConv(layers.Conv):
  """A convolution whose kernels are divided by their length for each output channel, times a gain of ones (1602.07868)."""

  def __init__(self, in_features: int, out_features: int, kernel_size: int, *, rngs: layers.ParamKeys, **conv: Any):
    super().__init__(in_features, out_features, kernel_size, rngs=rngs, **conv)
    self.gain = nnx.Param(layers.full(1)(None, (out_features,)))

  def weight(self) -> Array:
    kernel = self.kernel[...]
    return kernel * (jax.lax.rsqrt(jnp.sum(kernel**2, axis=(0, 1, 2)) + 1e-12) * self.gain[...])


class WeightStdConv(layers.WSConv):
  """Weight standardization (1903.10520): kernels have the variance 1, where the scaled form has 1 / fan_in."""

  def standardize(self) -> Array:
    return super().standardize() * math.prod(self.kernel.shape[-4:-1]) ** 0.5  # four axes also where blocks are stacked


def make_norm(norm: str, features: int, *, dtype: Any, rngs: layers.ParamKeys) -> nnx.Module | None:
  """Makes the normalizer of activations that `norm` names, with scale and bias [features]; None where it names none.

  Raises:
    UnknownNormError: there is no such name, or its number does not fit.
  """
  name, number = parse(norm)
  init: dict[str, Any] = {
    "scale_init": layers.full(1),
    "bias_init": layers.full(0),
    "epsilon": EPSILON,
    "dtype": dtype,
    "rngs": rngs,
  }
  if name in ("batch", "noisy_batch"):
    return (nnx.BatchNorm if name == "batch" else NoisyBatchNorm)(features, momentum=MOMENTUM, **init)
  if name in ("group", "layer", "instance"):
    groups = int(number) if number else {"group": min(32, features), "layer": 1, "instance": features}[name]
    if features % groups:
      raise UnknownNormError(f"norm={norm!r}: expected a divisor of the {features} channels")
    return nnx.GroupNorm(features, groups, **init)
  if name == "ghost":
    return GhostNorm(features, int(number), dtype)
  if name == "lp":
    return LpNorm(features, float(number), dtype)
  return Squash(features, erf=name == "derf", dtype=dtype) if name in ("dyt", "derf") else None


def normalize(norm: nnx.Module | None, x: Array, train: bool, key: Array | None = None) -> Array:
  """Applies what `make_norm` made; in training, those with running statistics use the batch's and move their own.

  `key` is for noisy_batch alone, which without one makes no noise.
  """
  if norm is None:
    return x
  apply: Any = norm
  x = apply(x, use_running_average=not train) if isinstance(norm, nnx.BatchNorm | RunningNorm) else apply(x)
  return noise(x, key) if train and key is not None and isinstance(norm, NoisyBatchNorm) else x


def conv_of(norm: str) -> Any:
  """The class of convolution that `norm` names."""
  return {"weight_norm": WeightNormConv, "weight_std": WeightStdConv, "scaled_weight_std": layers.WSConv}.get(norm, layers.Conv)


def activation_of(norm: str, activation: str) -> activations.Activation:
  """The nonlinearity; with its gamma where weights are standardized so that it is relied on."""
  found = activations.ACTIVATIONS[activation]
  return found if norm == "scaled_weight_std" else found.without_gamma()
