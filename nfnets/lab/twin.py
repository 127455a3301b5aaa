"""The normalizer-free twin of a batch-normalized network: of one of the zoo, or of a user's that is built with a kit.

A user's network is written once, with what a kit gives in place of convolutions, normalizers, nonlinearities and sums:

  class Block(nnx.Module):
    def __init__(self, kit, features):
      self.join = kit.block()
      self.norm, self.conv = kit.norm(features), kit.conv(features, features, 3)
    def __call__(self, x, train=True):
      out = self.conv(self.join.enter(kit.activation(self.norm(x, train))))
      return self.join(x, out)

With BatchNormKit it is the network as it was; with NormFreeKit normalizers do nothing, convolutions are standardized, activations
have their gamma, and branches are scaled by alpha and beta, by the rules of Brock et al. 2021 (2101.08692), sections 3 and 4.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nfnets import models
from nfnets.errors import UserError
from nfnets.models import activations, layers
from nfnets.models.norms import make_norm, normalize

Array = jax.Array


class Junction(nnx.Module):
  """Where a residual branch begins and ends."""

  def __init__(self, alpha: float, beta: float, gain: float | None):
    self.alpha, self.beta = alpha, beta
    self.gain = None if gain is None else nnx.Param(layers.full(gain)(None, ()))

  def enter(self, x: Array) -> Array:
    """What the branch's first convolution reads, of the activated input; a transition's shortcut reads it, too."""
    return x * self.beta

  def __call__(self, shortcut: Array, branch: Array) -> Array:
    """The sum of both."""
    return shortcut + branch * self.alpha * (1.0 if self.gain is None else self.gain[...])


class Norm(nnx.Module):
  """A normalizer, or nothing, called as norm(x, train)."""

  def __init__(self, norm: nnx.Module | None):
    self.norm = norm

  def __call__(self, x: Array, train: bool) -> Array:
    return normalize(self.norm, x, train)


class BatchNormKit:
  """Plain convolutions with He's initialisation, batch normalization, sums; `seed` of the weights."""

  def __init__(self, seed: int | Array):
    self.keys = layers.ParamKeys(jax.random.key(seed) if isinstance(seed, int) else seed)

  def conv(self, in_features: int, out_features: int, size: int, *, strides: int = 1) -> nnx.Module:
    """A convolution without bias, [B, H, W, in] → [B, H', W', out]."""
    init = layers.normal((2 / (size * size * in_features)) ** 0.5)
    return layers.Conv(in_features, out_features, size, strides=strides, use_bias=False, kernel_init=init, rngs=self.keys)

  def norm(self, features: int) -> Norm:
    """What stands before an activation."""
    return Norm(make_norm("batch", features, dtype=jnp.float32, rngs=self.keys))

  def activation(self, x: Array, name: str = "relu") -> Array:
    """The nonlinearity, one of nfnets.models.activations.ACTIVATIONS."""
    return activations.ACTIVATIONS[name].without_gamma()(x)

  def block(self, *, transition: bool = False) -> Junction:
    """The junction of the next block, in the order of the network; `transition` says that its shortcut is a convolution."""
    return Junction(1.0, 1.0, None)

  def classifier(self, features: int, classes: int) -> nnx.Module:
    """The last layer, [B, features] → [B, classes]."""
    return layers.linear(features, classes, stddev=0.01, rngs=self.keys)


class NormFreeKit(BatchNormKit):
  """Scaled weight standardization, activations with gamma, no normalizer; branches scaled by alpha, beta and a gain."""

  def __init__(self, seed: int | Array, *, alpha: float = 0.2, gain: float = 0.0):
    super().__init__(seed)
    self._alpha, self._gain, self._expected_std = alpha, gain, 1.0

  def conv(self, in_features: int, out_features: int, size: int, *, strides: int = 1) -> nnx.Module:
    return layers.WSConv(in_features, out_features, size, strides=strides, rngs=self.keys)

  def norm(self, features: int) -> Norm:
    return Norm(None)

  def activation(self, x: Array, name: str = "relu") -> Array:
    return activations.ACTIVATIONS[name](x)

  def block(self, *, transition: bool = False) -> Junction:
    beta = 1 / self._expected_std
    self._expected_std = ((1.0 if transition else self._expected_std**2) + self._alpha**2) ** 0.5
    return Junction(self._alpha, beta, self._gain)


def has_twin(config: Any) -> bool:
  """Whether a row of the variants' table is a ResNet with batch normalization."""
  return getattr(config, "norm", None) == "batch"


def nf_twin(name: str, num_classes: int, *, rngs: Any, **overrides: Any) -> models.Network:
  """Makes the normalizer-free twin of the zoo's batch-normalized ResNet of that name; arguments as for `models.create`.

  Depth, width, stem, strides, activation and rates are the same.

  Raises:
    UserError: the network is none with batch normalization.
  """
  if not has_twin(models.variant(name, **overrides)):
    raise UserError(f"a twin is made of a ResNet with batch normalization, such as resnet50; got {name}")
  return models.create(name, num_classes, rngs=rngs, **{**overrides, "norm": "nf"})


def clipping(batch: int) -> float:
  """AGC's λ for batches of this size, at least 256: 0.01 at 4,096 and above, and in inverse proportion below, to 0.16."""
  return min(0.16, max(0.01, 0.01 * 4096 / batch))


def recipe_changes() -> list[str]:
  """What to change in the recipe of a batch-normalized network for its twin, a sentence each.

  From section 4 of 2102.06171 and section 4 of 2101.08692; the thresholds below batch 4,096 are ours, as in configs/nf_resnet.py.
  """
  return [
    "Clip: optax.chain(agc(λ), …), without the classifier's weight, λ = "
    + ", ".join(f"{clipping(batch):g} at batch {batch:,}" for batch in (256, 512, 1024, 2048, 4096))
    + " and above; at smaller batches AGC gains little and slows short trainings down.",
    "A branch's gain begins with 0, and AGC then holds its steps to λ · 0.001 times the learning rate, also in the published "
    'code. Where training is short, leave the gains out: agc(λ, exclude=r"skip_gain$|^fc/kernel$").',
    "Weight decay: kernels only, not gains, biases and the branches' scalars.",
    "Learning rate: as before, scaled with the batch, with five epochs of warm-up; large batches need AGC for it.",
    "Regularize more: what batch normalization's noise did is left to dropout (0.2 and more), stochastic depth and stronger "
    "augmentation.",
    "Running statistics are gone: nothing to synchronize over devices, to recompute for an average of weights, or to switch for "
    "evaluation.",
    "Any batch size from 1 on computes the same function; accumulate gradients as you like.",
  ]
