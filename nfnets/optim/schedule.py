"""The learning rate: linear warm-up, then cosine or constant."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nfnets.config import OptimConfig
from nfnets.errors import UserError


def peak_lr(config: OptimConfig, batch: int) -> float:
  """The learning rate at the end of the warm-up: base_lr · batch / 256 (Goyal et al. 2017), or base_lr if not scaled.

  Args:
    config: `base_lr` and `scale_lr` are read.
    batch: images a step, over all devices.

  Raises:
    UserError: batch < 1.
  """
  if batch < 1:
    raise UserError(f"batch = {batch!r}: expected the number of images a step, at least 1.")
  return config.base_lr * batch / 256 if config.scale_lr else config.base_lr


def make_schedule(config: OptimConfig, *, batch: int, steps_per_epoch: float, total_steps: int) -> optax.Schedule:
  """Linear warm-up from 0 to the peak, then half a cosine down to `end_lr` (or the peak to the end, for "constant").

  Step 0 has learning rate 0 when there is a warm-up, as in the published runs; the peak falls on step
  warmup_epochs · steps_per_epoch, which need not be whole. From `total_steps` on the value stays at `end_lr`.

  Args:
    config: `base_lr`, `scale_lr`, `end_lr`, `warmup_epochs` and `schedule` are read.
    batch: images a step, over all devices.
    steps_per_epoch: images of the training set / batch; fractions are kept.
    total_steps: length of the training, in steps; exact up to 2**24.

  Returns:
    schedule: step (int or int []) → learning rate, float32 [].

  Raises:
    UserError: a number is out of range, the warm-up leaves no step after it, or the end is above the peak.
  """
  config.validate()
  peak, end = peak_lr(config, batch), config.end_lr
  if not 0 < steps_per_epoch < math.inf:
    raise UserError(f"steps_per_epoch = {steps_per_epoch!r}: expected a finite number > 0.")
  if total_steps < 1:
    raise UserError(f"total_steps = {total_steps!r}: expected at least 1.")
  warmup = config.warmup_epochs * steps_per_epoch
  if warmup >= total_steps:
    raise UserError(
      f"The warm-up of {config.warmup_epochs:g} epochs ({warmup:g} steps) does not end within the training of "
      f"{total_steps} steps. Lower OptimConfig.warmup_epochs or train for longer."
    )
  if end > peak:
    raise UserError(f"OptimConfig.end_lr = {end:g} is above the peak learning rate {peak:g}; lower it.")

  def schedule(step: Any) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    value = jnp.float32(peak)
    if config.schedule == "cosine":
      # sin² of the share that remains, not (1 + cos)/2 of the share that is done: the same curve, but exact to the last step.
      remaining = jnp.clip((total_steps - step) / (total_steps - warmup), 0.0, 1.0)
      value = end + (peak - end) * jnp.sin(0.5 * jnp.pi * remaining) ** 2
    if warmup > 0:
      value = jnp.where(step <= warmup, peak * (step / warmup), value)
    return value

  return schedule
