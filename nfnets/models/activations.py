"""Activations that keep the variance at 1: each with the constant gamma, and written so that a platform computes it cheaply.

P1 is "Characterizing signal propagation to close the performance gap in unnormalized ResNets" (2101.08692); the release is the
code published with it and with its successor (2102.06171).
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True, slots=True)
class Activation:
  """Computes gamma · fn(x), where gamma = 1/std(fn(z)) for z ~ N(0, 1) keeps the variance at 1 (P1, section 4.1)."""

  name: str
  fn: Callable[[Array], Array]
  gamma: float

  def __call__(self, x: Array) -> Array:
    return self.fn(x) * self.gamma

  def without_gamma(self) -> "Activation":
    """The same activation with gamma = 1."""
    return dataclasses.replace(self, gamma=1.0)


def _with_slope(
  fn: Callable[[Array], Array],
  slope: Callable[[Array], Array],
  platform: str = "cuda",
  there: Callable[[Array], Array] | None = None,
) -> Callable[[Array], Array]:
  """Gives fn the derivative `slope` on one platform, computed in float32 at least, in place of the one that JAX derives.

  JAX's shares what is costly, the tanh or the sigmoid, with fn, and XLA's GPU backend then writes it to memory on the way forward
  and reads it on the way back, beside x. A slope that is written otherwise is computed from x alone where it is needed. XLA for
  TPUs plans less traffic with JAX's, and on CPUs there is no difference for the tanh and the sigmoid (docs/speed.md).

  Args:
    there: the same function as it is computed on that platform; None where it is `fn` too.
  """
  wide = lambda function: lambda x: function(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)
  choose = lambda x, other, own: jax.lax.platform_dependent(x, default=other, **{platform: wide(own)})
  function = jax.custom_jvp(fn if there is None else lambda x: choose(jnp.asarray(x, jnp.result_type(x, 0.0)), fn, there))
  derived = lambda x: jax.jvp(fn, (x,), (jnp.ones_like(x),))[1]

  @jax.jit  # so that it is traced once for each shape
  def derivative(x: Array) -> Array:
    return choose(x, derived, slope)

  @function.defjvp
  def tangent(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (moved,) = primals, tangents
    return function(x), derivative(x) * moved

  return function


def _gelu_by_erf(x: Array) -> Array:
  """GELU as PyTorch computes it. jax.nn.gelu has an erfc, whose small values are exact, and takes CPUs twice the time."""
  return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_by_erf_slope(x: Array) -> Array:
  return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5))) + x * jnp.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)


def _gelu_slope(x: Array) -> Array:
  """The derivative of x · sigmoid(2u), u = sqrt(2/π) · (x + 0.044715 x³), which is GELU with a tanh."""
  root, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
  gate = jax.nn.sigmoid(root * (x + cubic * x**3))
  return gate + x * gate * (1 - gate) * root * (1 + 3 * cubic * x**2)


def _silu_slope(x: Array) -> Array:
  """The derivative of x · sigmoid(x), its sigmoid by a tanh."""
  gate = 0.5 + 0.5 * jnp.tanh(0.5 * x)
  return gate * (1 + x * (1 - gate))


# The constants are the release's own, which its authors sampled: to be equal to it we need their digits, and tests derive each of
# them again. The release's glu and log_softmax are left out: they mix channels, which these blocks cannot use.
ACTIVATIONS = {
  activation.name: activation
  for activation in (
    Activation("identity", lambda x: x, 1.0),
    Activation("celu", jax.nn.celu, 1.270926833152771),
    Activation("elu", jax.nn.elu, 1.2716004848480225),
    Activation("gelu", _with_slope(functools.partial(jax.nn.gelu, approximate=True), _gelu_slope), 1.7015043497085571),
    Activation(  # of timm's dm_* models
      "gelu_erf",
      _with_slope(functools.partial(jax.nn.gelu, approximate=False), _gelu_by_erf_slope, "cpu", _gelu_by_erf),
      1.7015043497085571,
    ),
    Activation("leaky_relu", jax.nn.leaky_relu, 1.70590341091156),
    Activation("log_sigmoid", jax.nn.log_sigmoid, 1.9193484783172607),
    Activation("relu", jax.nn.relu, 1.7139588594436646),
    Activation("relu6", jax.nn.relu6, 1.7131484746932983),
    Activation("selu", jax.nn.selu, 1.0008515119552612),
    Activation("sigmoid", jax.nn.sigmoid, 4.803835391998291),
    Activation("silu", _with_slope(jax.nn.silu, _silu_slope), 1.7881293296813965),
    Activation("soft_sign", jax.nn.soft_sign, 2.338853120803833),
    Activation("softplus", jax.nn.softplus, 1.9203323125839233),
    Activation("tanh", jnp.tanh, 1.5939117670059204),
  )
}
ACTIVATIONS["swish"] = ACTIVATIONS["silu"]
