"""The convolution of all networks, in the form that is quickest on each platform. Arrays are [batch, height, width, channels]."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental.layout import Layout, with_layout_constraint

Array = jax.Array
Padding = Literal["SAME", "SYMMETRIC"]
_AXES = ("NHWC", "HWIO", "NHWC")  # of images, kernel and result


@functools.partial(jax.jit, static_argnames=("strides", "groups", "padding", "trained"))  # traced once for each shape
def convolve(
  x: Array, kernel: Array, *, strides: int = 1, groups: int = 1, padding: Padding = "SAME", trained: bool = False
) -> Array:
  """Computes a 2-D convolution.

  Programs for CPUs get other forms, of which XLA makes fast code, in loops too (docs/speed.md): a matrix product for 1×1 kernels,
  several convolutions for those with groups, and gradients that are convolutions over the same axes (`_convolve`).

  Args:
    x: [B, H, W, I].
    kernel: [kh, kw, I/groups, O], cast to x's dtype.
    strides: of height and width.
    groups: into how many groups the channels are divided.
    padding: "SAME" is XLA's (and TensorFlow's), "SYMMETRIC" is PyTorch's, (k-1)/2 on every side.
    trained: programs for TPUs keep a grouped kernel and its gradient in the layout of the parameter. Else XLA lays out as the
      convolution likes it whatever is computed with the gradient, and copies parameter, momentum and average there and back.

  Returns:
    [B, H', W', O], in x's dtype.
  """
  kernel = kernel.astype(x.dtype)
  pad = "SAME" if padding == "SAME" else tuple(((size - 1) // 2,) * 2 for size in kernel.shape[:2])
  options = {"window_strides": (strides, strides), "padding": pad, "feature_group_count": groups, "dimension_numbers": _AXES}
  whole = functools.partial(jax.lax.conv_general_dilated, **options)
  if groups > 1:
    on_cpu = functools.partial(_split, strides=strides, groups=groups, padding=padding)
    on_tpu = (lambda x, kernel: whole(x, with_layout_constraint(kernel, Layout((0, 1, 2, 3))))) if trained else whole
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, tpu=on_tpu, default=whole)
  if kernel.shape[:2] == (1, 1):
    return jax.lax.platform_dependent(x, kernel, cpu=functools.partial(_multiply, strides=strides), default=whole)
  return _convolve(strides, pad, x, kernel)


def _multiply(x: Array, kernel: Array, *, strides: int) -> Array:
  """A 1×1 convolution as a product of two matrices; of four dimensions XLA makes transposed copies for the kernel's gradient."""
  x = x[:, ::strides, ::strides]
  return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])


def _split(x: Array, kernel: Array, *, strides: int, groups: int, padding: Padding) -> Array:
  """A convolution with groups as convolutions of some groups each, concatenated.

  Groups narrower than 32 channels are put together into one block-diagonal kernel: fewer convolutions compile faster.
  """
  ins, outs = kernel.shape[2], kernel.shape[3] // groups  # channels of a group
  together = max(1, 32 // max(ins, 1))
  parts = []
  for start in range(0, groups, together):
    count = min(together, groups - start)
    part = kernel[..., start * outs : (start + count) * outs]
    if count > 1:
      part = jnp.einsum("hwigo,ng->hwnigo", part.reshape(*part.shape[:3], count, outs), jnp.eye(count, dtype=part.dtype))
      part = part.reshape(*part.shape[:2], count * ins, count * outs)
    parts.append(convolve(x[..., start * ins : (start + count) * ins], part, strides=strides, padding=padding))
  return jnp.concatenate(parts, axis=-1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _convolve(strides: int, pad: str | tuple[tuple[int, int], ...], x: Array, kernel: Array) -> Array:
  """A convolution whose gradients, in programs for CPUs, are convolutions over `_AXES` too.

  XLA's CPU backend computes any other order of axes many times slower. It reorders them itself, but neither in loops and branches
  nor in functions that are called. JAX's gradients of a convolution have other orders. Those of `by_x` and `by_kernel` in
  `_convolve_jvp` do not; in forward mode it is these two that have other orders.
  """
  return jax.lax.conv_general_dilated(x, kernel, (strides, strides), pad, dimension_numbers=_AXES)


@functools.partial(_convolve.defjvp, symbolic_zeros=True)
def _convolve_jvp(strides, pad, primals, tangents):
  (x, kernel), (moved_x, moved_kernel) = primals, tangents
  convolution = functools.partial(jax.lax.conv_general_dilated, window_strides=(strides, strides), padding=pad)
  whole = functools.partial(convolution, dimension_numbers=_AXES)

  # Both compute `whole`, written so that the transpose with respect to what moved is a convolution over `_AXES`.
  def by_x(moved_x: Array, kernel: Array) -> Array:
    return convolution(moved_x, kernel.swapaxes(2, 3), dimension_numbers=("NHWC", "HWOI", "NHWC"))

  def by_kernel(x: Array, moved_kernel: Array) -> Array:
    x, moved_kernel = x.transpose(3, 1, 2, 0), moved_kernel.transpose(2, 0, 1, 3)
    return convolution(x, moved_kernel, dimension_numbers=("CHWN", "IHWO", "HWNC")).transpose(2, 0, 1, 3)

  parts = []  # none for what is not differentiated, such as the stem's images
  if not isinstance(moved_x, SymbolicZero):
    parts.append(jax.lax.platform_dependent(moved_x, kernel, cpu=by_x, default=whole))
  if not isinstance(moved_kernel, SymbolicZero):
    parts.append(jax.lax.platform_dependent(x, moved_kernel, cpu=by_kernel, default=whole))
  return _convolve(strides, pad, x, kernel), functools.reduce(jnp.add, parts)
