"""How curved the loss is: the largest eigenvalue of its Hessian."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

Array = jax.Array


def sharpness(loss: Callable[[Any], Array], params: Any, *, iterations: int = 30, seed: int = 0) -> float:
  """Computes the largest (most positive) eigenvalue of the Hessian of `loss` at `params` by Lanczos (Cohen et al. 2021).

  Each iteration multiplies the Hessian with a vector, forward over reverse, and orthogonalizes twice against all vectors before.
  Hessians of trained networks have a few large eigenvalues, which 20 to 30 iterations find to three digits.

  Args:
    loss: params → float [].
    params: a pytree of float arrays, N numbers in all; iterations × N numbers are kept.
    iterations: at most this many, and at most N.
    seed: of the first vector.
  """
  return sharpness_of(loss, iterations=iterations)(params, seed)


def batch_sharpness(loss: Callable[..., Array], params: Any, *batches: Array) -> Array:
  """The mean over batches of gᵀ H g / gᵀ g, with gradient g and Hessian H of that batch's loss (2412.20553): float32 [].

  Args:
    loss: (params, *batch) → float [].
    params: a pytree of float arrays.
    batches: arrays whose first axis counts batches, such as images [batches, batch, …] and labels [batches, batch].
  """

  def of_batch(batch: tuple[Array, ...]) -> Array:
    gradient = jax.grad(lambda p: loss(p, *batch))
    direction, product = jax.jvp(gradient, (params,), (gradient(params),))
    inner = lambda a, b: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))
    return inner(direction, product) / jnp.maximum(inner(direction, direction), 1e-30)

  return jnp.mean(jax.lax.map(of_batch, batches))


def sharpness_of(loss: Callable[..., Array], *, iterations: int = 30) -> Callable[..., float]:
  """Makes (params, seed, *data) → the largest eigenvalue, with loss(params, *data); compiled once, for use during training."""
  compiled = jax.jit(lambda params, key, *data: _lanczos(lambda p: loss(p, *data), params, key, iterations))

  def measure(params: Any, seed: int = 0, *data: Any) -> float:
    alphas, betas = (np.asarray(x, np.float64) for x in compiled(params, jax.random.key(seed), *data))
    return top_of_tridiagonal(alphas, betas)

  return measure


def top_of_tridiagonal(alphas: np.ndarray, betas: np.ndarray) -> float:
  """The largest eigenvalue of the matrix with this diagonal, [k], and the first k - 1 of `betas`, [k], beside it.

  A beta that is zero beside the others says that the vectors span a space that the Hessian maps into itself: what comes after it
  is no more than rounding. NaN for a Hessian with numbers that are not finite.
  """
  if not np.isfinite(alphas).all() or not np.isfinite(betas).all():
    return float("nan")
  scale = max(np.abs(alphas).max(), np.abs(betas).max(), 1e-30)
  ended = np.flatnonzero(betas < 1e-6 * scale)
  size = int(ended[0]) + 1 if ended.size else len(alphas)
  matrix = np.diag(alphas[:size]) + np.diag(betas[: size - 1], 1) + np.diag(betas[: size - 1], -1)
  return float(np.linalg.eigvalsh(matrix)[-1])


def _lanczos(loss: Callable[[Any], Array], params: Any, key: Array, iterations: int) -> tuple[Array, Array]:
  """The diagonal and the secondary diagonal of the Hessian in the basis of Lanczos, float32 [k] each."""
  flat, unravel = ravel_pytree(params)
  gradient = jax.grad(lambda x: loss(unravel(x)))
  size = flat.size
  steps = min(iterations, size)
  first = jax.random.normal(key, (size,), flat.dtype)

  def step(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    basis, vector = carry
    basis = basis.at[i].set(vector)
    product = jax.jvp(gradient, (flat,), (vector,))[1]
    alpha = jnp.vdot(vector, product)
    rest = product
    for _ in range(2):  # once leaves what rounding brings back
      rest = rest - basis.T @ (basis @ rest)
    beta = jnp.linalg.norm(rest)
    return (basis, rest / jnp.maximum(beta, 1e-30)), (alpha, beta)

  start = (jnp.zeros((steps, size), flat.dtype), first / jnp.linalg.norm(first))
  _, (alphas, betas) = jax.lax.scan(step, start, jnp.arange(steps))
  return alphas, betas
