"""What the loss looks like around a point: along the gradient and in a plane of random directions; theory's bound for a layer."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nfnets.agc import named_leaves
from nfnets.lab.measures.signals import Array

EPSILON = 1e-12


def along_gradient(loss: Callable[[Any], Array], params: Any, steps: Array) -> dict[str, Array]:
  """Measures loss and gradient at params - step · gradient for several steps (Santurkar et al. 2018, section 3.2 and figure 4).

  Args:
    loss: params → float [].
    params: a pytree of float arrays.
    steps: float32 [k], positive.

  Returns:
    Float32 [] each: "lowest" and "highest" loss at these points; "gradient", ‖∇L‖ at params; "change", the largest
    ‖∇L - ∇L at a point‖, which tells how far the gradient can be relied on; "smoothness", the effective β: the largest of these
    changes, each divided by the distance to its point.
  """
  gradient = jax.grad(loss)(params)
  length = _length(gradient)

  def at(step: Array) -> tuple[Array, Array]:
    value, there = jax.value_and_grad(loss)(jax.tree.map(lambda p, g: p - step * g, params, gradient))
    return value, _length(jax.tree.map(jnp.subtract, gradient, there))

  losses, changes = jax.lax.map(at, steps)
  smoothness = jnp.max(changes / (steps * jnp.maximum(length, EPSILON)))
  highest, lowest = jnp.max(losses), jnp.min(losses)
  return {"lowest": lowest, "highest": highest, "gradient": length, "change": jnp.max(changes), "smoothness": smoothness}


def filter_direction(params: Any, key: Array, *, stacked: str | None = None) -> Any:
  """A random direction, filter by filter as long as the weights; other arrays do not move (Li et al. 2018, 1712.09913, 4).

  Args:
    params: nested dicts of float arrays. The last axis of a kernel counts its filters.
    key: of jax.random.
    stacked: a pattern, matched with re.search against paths such as "blocks/0/convs/0/kernel", of arrays whose first axis counts
      blocks, each with filters of its own.

  Returns:
    The same structure; each filter of an array of at least two axes has the length of that filter, all else is zero.
  """
  structure = jax.tree.structure(params)

  def of_leaf(path: str, leaf: Array, key: Array) -> Array:
    first = int(stacked is not None and re.search(stacked, path) is not None)
    if leaf.ndim < 2 + first:
      return jnp.zeros_like(leaf)
    axes = tuple(range(first, leaf.ndim - 1))
    drawn = jax.random.normal(key, (leaf.size,)).reshape(leaf.shape)  # flat, which compiles sooner
    size = lambda x: jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=True))
    return drawn / jnp.maximum(size(drawn), EPSILON) * size(leaf)

  leaves = named_leaves(params)
  keys = jax.random.split(key, len(leaves))
  return jax.tree.unflatten(structure, [of_leaf(path, leaf, k) for (path, leaf, _), k in zip(leaves, keys, strict=True)])


def plane(loss: Callable[[Any], Array], params: Any, key: Array, places: Array, *, stacked: str | None = None) -> Array:
  """The loss on a square around `params`, spanned by two of `filter_direction`: float32 [k, k], for coordinates `places` [k]."""
  across, up = (filter_direction(params, part, stacked=stacked) for part in jax.random.split(key))
  points = jnp.stack(jnp.meshgrid(places, places, indexing="ij"), axis=-1).reshape(-1, 2)
  at = lambda point: loss(jax.tree.map(lambda p, a, b: p + point[0] * a + point[1] * b, params, across, up))
  return jax.lax.map(at, points).reshape(len(places), len(places))


def batch_norm_bound(outer: Array, y: Array, scale: Array, epsilon: float) -> tuple[Array, Array]:
  """Both sides of the inequality of theorem 4.1 of Santurkar et al. 2018, for each channel of one batch normalization.

  ‖∂L/∂y‖² ≤ (γ² / σ²) · (‖∂L/∂z‖² - ⟨1, ∂L/∂z⟩² / m - ⟨∂L/∂z, ŷ⟩² / m), where z = γ ŷ + β is what the normalization gives and
  ŷ = (y - mean) / σ. Its proof shows that the sides are equal where nothing is added to the variance.

  Args:
    outer: ∂L/∂z, float32 [m, channels], m numbers of a channel in the batch.
    y: what is normalized, [m, channels].
    scale: γ, [channels].
    epsilon: what the normalization adds to the variance.

  Returns:
    (left, right), float32 [channels] each; the left side by differentiating the normalization.
  """
  m = y.shape[0]

  def normalized(y: Array) -> Array:
    centred = y - jnp.mean(y, axis=0)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=0) + epsilon)

  hat, back = jax.vjp(normalized, y)
  (inner,) = back(outer * scale)
  variance = jnp.var(y, axis=0) + epsilon
  rest = jnp.sum(outer**2, axis=0) - jnp.sum(outer, axis=0) ** 2 / m - jnp.sum(outer * hat, axis=0) ** 2 / m
  return jnp.sum(inner**2, axis=0), scale**2 / variance * rest


def _length(tree: Any) -> Array:
  return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))
