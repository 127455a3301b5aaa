"""The convolution's forms for CPUs against XLA's own convolution, and what XLA makes of their gradients."""

import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import pytest

from nfnets.models.convolution import convolve


def reference(x, kernel, *, strides, groups, padding):
  pad = "SAME" if padding == "SAME" else [((size - 1) // 2,) * 2 for size in kernel.shape[:2]]
  return jax.lax.conv_general_dilated(
    x, kernel, (strides, strides), pad, feature_group_count=groups, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def make_step(function, **options):
  return jax.jit(jax.value_and_grad(lambda x, kernel: jnp.sum(jnp.sin(function(x, kernel, **options))), (0, 1)))


def arrays(size, features, kernel_shape):
  x = jax.random.normal(jax.random.key(0), (2, size, size + 1, features))
  return x, jax.random.normal(jax.random.key(1), kernel_shape)


def lowered(step, *args, platform):
  return step.trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
  "groups, width, strides, padding",
  [*itertools.product((2, 6), (64,), (1, 2), ("SAME", "SYMMETRIC")), *itertools.product((5, 16), (8,), (1, 2), ("SAME",))],
)
def test_split_groups_equal_grouped_convolution(groups, width, strides, padding):
  """Programs for CPUs have split groups alone, programs for accelerators whole ones alone; outputs and gradients are equal."""
  args = arrays(7, groups * width, (3, 3, width, groups * width))
  options = {"strides": strides, "groups": groups, "padding": padding}
  step = make_step(convolve, **options)
  for platform in ("cuda", "tpu"):
    text = lowered(step, *args, platform=platform)
    counts = re.findall(r"batch_group_count = (\d+).*?feature_group_count = (\d+)", text)
    assert [max(map(int, pair)) for pair in counts] == [groups] * 3
  text = step.lower(*args).compile().as_text()
  assert "group_count=" not in text
  assert len(re.findall(r"dim_labels=\w+_\w+->", text)) == 3 * -(-groups // max(1, 32 // width))
  chex.assert_trees_all_close(step(*args), make_step(reference, **options)(*args), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("strides, size, padding", [*itertools.product((1, 2, 3), (8, 7), ("SAME", "SYMMETRIC"))])
def test_a_product_equals_the_1x1_convolution(strides, size, padding):
  """Programs for CPUs have the product alone, without transposed copies, others the convolution alone."""
  args = arrays(size, 5, (1, 1, 5, 6))
  options = {"strides": strides, "groups": 1, "padding": padding}
  step = make_step(convolve, **options)
  for platform, products, convolutions in (("cpu", True, 0), ("cuda", False, 3), ("tpu", False, 3)):
    text = lowered(step, *args, platform=platform)
    assert ("dot_general" in text) == products and text.count("stablehlo.convolution") == convolutions
  places = 2 * len(range(0, size, strides)) * len(range(0, size + 1, strides))
  assert not re.search(rf"f32\[[56],{places}\]", step.lower(*args).compile().as_text())
  chex.assert_trees_all_close(step(*args), make_step(reference, **options)(*args), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  "side, strides, size, padding",
  [*itertools.product((3,), (1, 2, 3), (8, 9), ("SAME", "SYMMETRIC")), *itertools.product((2, 5), (2,), (8, 9), ("SAME",))],
)
def test_gradients_equal_those_of_the_plain_convolution(side, strides, size, padding):
  """In reverse mode, forward mode, forward over reverse mode, and one by one for the images of a vmap."""
  args = arrays(size, 3, (side, side, 3, 4))
  options = {"strides": strides, "groups": 1, "padding": padding}

  @functools.partial(jax.jit, static_argnums=0)
  def derivatives(function, x, kernel):
    step, moved = make_step(function, **options), (jnp.cos(x), jnp.sin(kernel))
    forward = jax.jvp(lambda *args: (function(*args, **options), step(*args)), (x, kernel), moved)
    return forward, jax.vmap(lambda x: step(x[None], kernel))(x)

  chex.assert_trees_all_close(derivatives(convolve, *args), derivatives(reference, *args), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("strides, groups", [(1, 1), (2, 1), (1, 2)])
def test_gradients_in_loops_have_the_order_of_axes_that_xla_computes_fast_on_cpus(strides, groups):
  """XLA's CPU backend reorders the axes of convolutions, but not of those in loops, where others take several times as long."""
  x, kernel = arrays(8, 64, (3, 3, 64 // groups, 64))

  def orders(function):
    step = make_step(function, strides=strides, groups=groups, padding="SAME")

    def body(kernel, x):
      by_x, by_kernel = step(x, kernel)[1]
      return kernel - by_kernel, by_x

    text = jax.jit(functools.partial(jax.lax.scan, body)).lower(kernel, jnp.stack([x, x])).compile().as_text()
    assert " while(" in text
    return set(re.findall(r"dim_labels=([^,\s]+)", text))

  assert orders(convolve) == {"b01f_01io->b01f"}
  if groups == 1:  # else XLA does without our gradients, and they can go
    assert len(orders(reference)) > 1


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_for_accelerators_have_the_gradients_that_jax_derives(platform):
  args = arrays(8, 6, (3, 3, 6, 4))

  def convolutions(function):
    text = lowered(make_step(function, strides=2, groups=1, padding="SAME"), *args, platform=platform)
    return sorted(re.findall(r"dim_numbers = (.*?), window = (\{.*?\})", text))

  assert convolutions(convolve) == convolutions(reference)
  assert len(convolutions(convolve)) == 3
