"""The layers that normalizer-free networks are made of.

P1 is "Characterizing signal propagation to close the performance gap in unnormalized ResNets" (2101.08692), P2 is
"High-Performance Large-Scale Image Recognition Without Normalization" (2102.06171); the release is the code published with them.
Parameters are float32. A layer computes in its input's dtype, but standardizes weights and pools in float32. Images and features
are [batch, height, width, channels].
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfnets.models.convolution import Padding, convolve

Array = jax.Array


# ---- initial values
_BLOCK = 1 << 18  # numbers that one draw makes


class ParamKeys:
  """Gives keys for parameters, a new one at each call, all made from one key; it is enough where flax takes `rngs`.

  nnx.Rngs would keep a count in a traced Variable, with which abstract creation takes quadratic time in the number of parameters.
  """

  def __init__(self, key: Array):
    self._key, self._count = key, 0

  def params(self) -> Array:
    """The next key; named as flax's stream of keys for parameters."""
    self._count += 1
    return jax.random.fold_in(self._key, self._count)


@functools.partial(jax.jit, static_argnums=2)
def _draw_block(key: Array, index: Array, truncated: bool) -> Array:
  """Draws block number `index` of N(0, 1), float32 [_BLOCK]."""
  key = jax.random.fold_in(key, index)
  return jax.random.truncated_normal(key, -2.0, 2.0, (_BLOCK,)) if truncated else jax.random.normal(key, (_BLOCK,))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw_traced(key: Array, shape: tuple[int, ...], truncated: bool) -> Array:
  """Draws the same numbers as `normal` does eagerly, in one program."""
  blocks = jax.vmap(_draw_block, (None, 0, None))(key, jnp.arange(-(-math.prod(shape) // _BLOCK)), truncated)
  return blocks.reshape(-1)[: math.prod(shape)].reshape(shape)


def normal(stddev: float, *, truncated: bool = False) -> Callable[..., Array]:
  """Makes the initializer that draws from N(0, stddev²); truncated draws are cut at two deviations and not rescaled, as Haiku's.

  It draws in blocks of one size, so that creating a network compiles one program and not one for each shape of its parameters.
  """

  def init(key: Array, shape: Sequence[int], dtype=jnp.float32) -> Array:
    shape, size = tuple(shape), math.prod(shape)
    if isinstance(key, jax.core.Tracer):
      return (_draw_traced(key, shape, truncated) * stddev).astype(dtype)
    blocks = np.concatenate([_draw_block(key, i, truncated) for i in range(-(-size // _BLOCK))])
    return jnp.asarray((blocks[:size].reshape(shape) * np.float32(stddev)).astype(dtype, copy=False))

  return init


def full(value: float) -> Callable[..., Array]:
  """Makes the initializer that fills with `value`; by NumPy, since jnp.full would compile a program for every shape."""

  def init(key: Array | None, shape: Sequence[int], dtype=jnp.float32) -> Array:
    return jnp.asarray(np.full(shape, value, dtype))

  return init


def linear(in_features: int, out_features: int, *, stddev: float | None = None, dtype=None, rngs: ParamKeys) -> nnx.Linear:
  """Makes a dense layer, kernel [in, out] ~ N(0, stddev²), zero for stddev 0; bias zero.

  With stddev None, the kernel is drawn as in the release, from a truncated normal with deviation 1/sqrt(in).
  """
  init = normal(in_features**-0.5, truncated=True) if stddev is None else normal(stddev) if stddev else full(0)
  keys: Any = rngs  # flax declares Rngs, but takes anything that gives keys
  return nnx.Linear(in_features, out_features, kernel_init=init, bias_init=full(0), dtype=dtype, rngs=keys)


# ---- convolutions
class Conv(nnx.Module):
  """A plain convolution: kernel [k, k, in/groups, out], by default truncated normal with deviation 1/sqrt(fan_in); bias [out]."""

  standardized = False

  def __init__(
    self,
    in_features: int,
    out_features: int,
    kernel_size: int,
    *,
    strides: int = 1,
    groups: int = 1,
    padding: Padding = "SAME",
    use_bias: bool = True,
    kernel_init: Callable[..., Array] | None = None,
    rngs: ParamKeys,
  ):
    if min(in_features, out_features, groups) < 1 or in_features % groups or out_features % groups:
      raise ValueError(f"groups={groups}: expected a divisor of in_features={in_features} and of out_features={out_features}")
    self.strides, self.groups, self.padding = strides, groups, padding
    shape = (kernel_size, kernel_size, in_features // groups, out_features)
    init = kernel_init or self.default_init(math.prod(shape[:-1]))
    self.kernel = nnx.Param(init(rngs.params(), shape))
    self.bias = nnx.Param(full(0)(None, (out_features,))) if use_bias else None

  def default_init(self, fan_in: int) -> Callable[..., Array]:
    """The kernel's initializer where none is given."""
    return normal(fan_in**-0.5, truncated=True)

  def weight(self) -> Array:
    """The kernel to convolve with, float32 [k, k, in/groups, out]."""
    return self.kernel[...]

  def __call__(self, x: Array) -> Array:
    options = {"strides": self.strides, "groups": self.groups, "padding": self.padding}
    out = convolve(x, self.weight(), trained=self.standardized, **options)
    return out if self.bias is None else out + self.bias[...].astype(out.dtype)


class WSConv(Conv):
  """A convolution with Scaled Weight Standardization (P1, section 4.3), for each output channel and with statistics in float32:

      W' = gain · (W - mean(W)) / sqrt(max(var(W) · fan_in, 1e-4)),  fan_in = k · k · in/groups, biased variance.

  Parameters: kernel [k, k, in/groups, out] ~ N(0, 1/fan_in), gain [out] ones, bias [out] zeros. `standardized` says that the
  kernel is W' already (see `standardize`), as in training; NNX keeps this mark in the graph definition.
  """

  def __init__(self, in_features: int, out_features: int, kernel_size: int, *, gain_init: float = 1.0, rngs: ParamKeys, **conv):
    super().__init__(in_features, out_features, kernel_size, rngs=rngs, **conv)
    self.gain = nnx.Param(full(gain_init)(None, (out_features,)))
    self.standardized = False

  def default_init(self, fan_in: int) -> Callable[..., Array]:
    return normal(fan_in**-0.5)

  def weight(self) -> Array:
    return self.kernel[...] if self.standardized else self.standardize()

  def standardize(self) -> Array:
    kernel, gain = self.kernel[...], self.gain[...]
    return _standardize(kernel, gain) if kernel.ndim == 4 else jax.vmap(_standardize)(kernel, gain)  # of stacked blocks


@jax.jit  # so that it is traced once for each shape
def _standardize(kernel: Array, gain: Array) -> Array:
  kernel = kernel.astype(jnp.float32)
  fan_in = math.prod(kernel.shape[:-1])
  mean, var = moments(kernel)
  scale = jax.lax.rsqrt(jnp.maximum(var * fan_in, 1e-4)) * gain
  return kernel * scale - mean * scale


@jax.custom_jvp
def moments(kernel: Array) -> tuple[Array, Array]:
  """Mean and biased variance of each output channel's numbers: [k, k, in/groups, out] → two of [out].

  Deviations from a mean sum to 0, so that the mean does not change the variance. JAX does not know that, and would add them up
  for each kernel of the network on the way back.
  """
  return jnp.mean(kernel, axis=(0, 1, 2)), jnp.var(kernel, axis=(0, 1, 2))


@moments.defjvp
def _moments_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
  (kernel,), (change,) = primals, tangents
  mean, var = moments(kernel)
  return (mean, var), (jnp.mean(change, axis=(0, 1, 2)), jnp.mean(2 * (kernel - mean) * change, axis=(0, 1, 2)))


def standardize(network: nnx.Module) -> None:
  """Replaces the kernel of every WSConv by its W' and marks it as standardized, in place; a second call changes nothing."""
  for _, module in nnx.iter_modules(network):
    if isinstance(module, WSConv):
      module.kernel[...] = module.weight()
      module.standardized = True


# ---- pooling and gates
def average_pool(x: Array) -> Array:
  """Averages 2×2 pixels with stride 2, [B, H, W, C] → [B, ⌈H/2⌉, ⌈W/2⌉, C]; at an odd edge only real pixels count."""
  batch, height, width, features = x.shape
  if height % 2 == width % 2 == 0:  # the gradient of a mean is a broadcast, which XLA fuses; that of a window is not
    return jnp.mean(x.reshape(batch, height // 2, 2, width // 2, 2, features), axis=(2, 4))
  mean = nnx.avg_pool(x, (2, 2), strides=(2, 2), padding="SAME", count_include_pad=False)
  return mean.astype(x.dtype)  # flax counts the pixels in float32, and so returns float32


def max_pool(x: Array, padding: Padding = "SAME") -> Array:
  """Takes the maximum of 3×3 pixels with stride 2, [B, H, W, C] → [B, ⌈H/2⌉, ⌈W/2⌉, C]; `padding` as of `convolve`."""
  return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME" if padding == "SAME" else ((1, 1), (1, 1)))


def global_pool(x: Array) -> Array:
  """Averages over height and width, in float32, [B, H, W, C] → [B, C]."""
  return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


class SqueezeExcite(nnx.Module):
  """A gate [B, 1, 1, C] in (0, 1): mean → fc0 → ReLU → fc1 → sigmoid. P2's text has a GELU; the release and timm use ReLU."""

  def __init__(self, features: int, hidden: int, *, dtype, rngs: ParamKeys):
    self.fc0 = linear(features, hidden, dtype=dtype, rngs=rngs)
    self.fc1 = linear(hidden, features, dtype=dtype, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    hidden = jax.nn.relu(self.fc0(global_pool(x).astype(x.dtype)))
    return jax.nn.sigmoid(self.fc1(hidden))[:, None, None, :]


class EfficientChannelAttention(nnx.Module):
  """A gate [B, 1, 1, C]: mean → 1-D convolution across channels, kernel [k, 1, 1] → sigmoid (ECA-Net, 1910.03151)."""

  def __init__(self, features: int, *, rngs: ParamKeys):
    size = int(abs(math.log2(features) + 1) / 2)
    size = max(size if size % 2 else size + 1, 3)
    self.kernel = nnx.Param(normal(size**-0.5)(rngs.params(), (size, 1, 1)))

  def __call__(self, x: Array) -> Array:
    mean = global_pool(x).astype(x.dtype)[:, :, None]
    mixed = jax.lax.conv_general_dilated(
      mean, self.kernel[...].astype(x.dtype), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jax.nn.sigmoid(mixed.squeeze(2))[:, None, None, :]


# ---- randomness
def _is_per_sample(key: Array) -> bool:
  """Whether `key` is an array of keys, one for each sample, and not a single one."""
  return key.ndim > (0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1)


def fold_in(key: Array, data: int) -> Array:
  """Calls `jax.random.fold_in` for a key, or for each of the samples' keys [batch]."""
  return jax.vmap(jax.random.fold_in, (0, None))(key, data) if _is_per_sample(key) else jax.random.fold_in(key, data)


def bernoulli(key: Array, p: float, shape: Sequence[int]) -> Array:
  """Draws bool [batch, …], True with probability p.

  With keys [batch], one for each sample, the draws are the same however a batch is divided among devices or into parts.
  """
  if _is_per_sample(key):
    return jax.vmap(lambda key: jax.random.bernoulli(key, p, tuple(shape[1:])))(key)
  return jax.random.bernoulli(key, p, tuple(shape))


def join(
  shortcut: Array,
  branch: Array,
  *,
  alpha: float = 1.0,
  gain: nnx.Param | None = None,
  gate: Array | None = None,
  drop_rate: Any = None,
  key: Array | None = None,
) -> Array:
  """Ends a residual block: shortcut + alpha · gain · gate · branch, [B, H, W, C].

  The factors are multiplied with each other first, in float32: they are small, the branch is read once, and the gradient of all
  of them is one sum over it.

  Args:
    shortcut, branch: [B, H, W, C].
    alpha: a number.
    gain: a scalar parameter.
    gate: [B, 1, 1, C].
    drop_rate: of stochastic depth, which zeroes a sample's branch with this probability; what stays is not rescaled (the release,
      unlike timm). None: no sample's.
    key: for `drop_rate`; one, or [B].
  """
  scale: Any = alpha
  precise = jnp.promote_types(branch.dtype, jnp.float32)
  for factor in (gain if gain is None else gain[...], gate):
    scale = scale if factor is None else scale * factor.astype(precise)
  if drop_rate is not None:
    assert key is not None  # the network has raised an error without it
    scale = jnp.where(bernoulli(key, 1.0 - drop_rate, (len(branch), 1, 1, 1)), scale, 0)
  return branch * jnp.asarray(scale, branch.dtype) + shortcut
