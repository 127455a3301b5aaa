"""The exponential moving average (EMA) of the parameters."""

from typing import Any

import jax
import jax.numpy as jnp


def ema_update(ema: Any, params: Any, step: jax.Array | int, decay: float) -> Any:
  """One step of the parameters' exponential moving average, with the decay warmed up as min(decay, (1 + t)/(10 + t)).

  Args:
    ema: the average so far, float32; the initial parameters before the first step.
    params: the parameters after this step's update, of the same structure.
    step: t, the number of updates before this one: 0 at the first, so that its decay is 0.1. (As the published code
      counts; TensorFlow 1's rule.)
    decay: the decay in the long run, in [0, 1), as a Python number.

  Returns:
    The new average, float32. Jittable.
  """
  # The weight of the new value comes from 1 - decay in double precision: float32(0.99999) leaves 1.0014e-5, not 1e-5.
  weight = jnp.maximum(1.0 - decay, 9.0 / (10.0 + jnp.asarray(step, jnp.float32)))

  def blend(old: jax.Array, new: jax.Array) -> jax.Array:
    old = jnp.asarray(old, jnp.float32)
    return old + weight * (jnp.asarray(new, jnp.float32) - old)

  return jax.tree.map(blend, ema, params)
