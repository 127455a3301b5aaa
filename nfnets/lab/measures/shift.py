"""Internal covariate shift: what the update of the layers before a layer does to that layer's gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def covariate_shift(loss: Callable[[Any], Array], before: Any, after: Any, layers: Any) -> dict[str, Array]:
  """Measures internal covariate shift by definition 2.1 of Santurkar et al. 2018 (1805.11604).

  G_i is the gradient with respect to layer i before a step, and G'_i the same gradient with the layers before i already moved.

  Args:
    loss: params → float [], on the images of the step.
    before, after: parameters before and after a step, pytrees of float arrays.
    layers: a pytree of the same structure; the number of each array's layer, an int from 0 on, counted from the input.

  Returns:
    Float32 [layers] each: "shift", ‖G_i - G'_i‖₂; "norm", ‖G_i‖₂; "cosine" of the angle between G_i and G'_i, 1 where both are
    zero. Layer 0 has a shift of 0.
  """
  gradient = jax.grad(loss)
  first, count = gradient(before), 1 + max(jax.tree.leaves(layers))

  def of_layer(i: Array) -> dict[str, Array]:
    second = gradient(jax.tree.map(lambda b, a, number: jnp.where(number < i, a, b), before, after, layers))
    here = jax.tree.map(lambda number: number == i, layers)
    inner = lambda x, y: sum(jax.tree.leaves(jax.tree.map(lambda a, b, at: jnp.where(at, jnp.vdot(a, b), 0.0), x, y, here)))
    difference = jax.tree.map(jnp.subtract, first, second)
    sizes = jnp.sqrt(inner(first, first) * inner(second, second))
    cosine = jnp.where(sizes > 0, inner(first, second) / jnp.where(sizes > 0, sizes, 1.0), 1.0)
    return {"shift": jnp.sqrt(inner(difference, difference)), "norm": jnp.sqrt(inner(first, first)), "cosine": cosine}

  return jax.lax.map(of_layer, jnp.arange(count))


def layer_numbers(params: Any) -> Any:
  """Numbers the layers of a network whose layers stand in lists, such as "convs/3/kernel"; what is in no list comes last."""
  number = lambda path: next((int(part.key) for part in path if str(part.key).isdigit()), None)
  found = [number(path) for path, _ in jax.tree.leaves_with_path(params)]
  last = 1 + max((place for place in found if place is not None), default=-1)
  return jax.tree.map_with_path(lambda path, _: last if (place := number(path)) is None else place, params)
