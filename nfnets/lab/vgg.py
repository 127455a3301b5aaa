"""A small VGG: convolutions with a normalizer after each, maxima of 2×2 pixels between the stages, no shortcuts."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from nfnets.lab import norms
from nfnets.models import layers

Array = jax.Array


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VGGConfig:
  """What a VGG is made of."""

  # channels of each stage; between stages images are halved
  width: tuple[int, ...] = (16, 32)
  # convolutions of 3×3 a stage
  convs: int = 2
  # a name of norms.NORMS; how branches are scaled means nothing here
  norm: str = "batch"
  activation: str = "relu"
  num_classes: int = 10
  # channels of the images
  in_features: int = 3


class VGG(nnx.Module):
  """Convolution → normalizer → activation, some times a stage, then the mean over space and the classifier (Simonyan 2014)."""

  def __init__(self, config: VGGConfig, key: Array):
    self.config = config
    keys = layers.ParamKeys(key)
    inputs = [config.in_features] + [width for width in config.width for _ in range(config.convs)]
    convs, normalizers = [], []
    for i, (before, after) in enumerate(zip(inputs, inputs[1:], strict=False)):
      act = config.activation if i else "identity"
      convs.append(norms.conv(config.norm, before, after, 3, act=act, keys=keys))
      normalizers.append(norms.make(config.norm, after, keys))
    self.convs, self.norms = nnx.List(convs), nnx.List(normalizers)
    self.activation = norms.activation(config.norm, config.activation)
    self.fc = layers.linear(config.width[-1], config.num_classes, stddev=config.width[-1] ** -0.5, rngs=keys)

  def __call__(self, images: Array, *, key: Array | None = None) -> Array:
    """Computes logits, float32 [batch, classes], of images [batch, height, width, in_features]; `key` is for noise."""
    return self.run(images, key=key)[0]

  def run(
    self, x: Array, *, key: Array | None = None, start: int | None = None, upto: int | None = None
  ) -> tuple[Array, list[Array]]:
    """Runs all or a part of the network.

    Args:
      x: images [batch, height, width, in_features]; or with `start` what the normalizer of that layer gives.
      key: for noise.
      start: the layer whose normalizer gave `x`, from 0.
      upto: the layer whose convolution is the last thing that runs.

    Returns:
      (Logits, or with `upto` what that convolution gives; what each normalizer gave, [batch, height, width, channels] each, or
      each convolution where there is none).
    """
    seen: list[Array] = []
    for i in range(start or 0, len(self.convs)):
      conv: Any = self.convs[i]
      if i != start:
        x = conv(x)
        if i == upto:
          return x, seen
        x = norms.normalize(self.norms[i], x, None if key is None else jax.random.fold_in(key, i))
      seen.append(x)
      x = self.activation(x)
      if (i + 1) % self.config.convs == 0 and i + 1 < len(self.convs):
        x = nnx.max_pool(x, (2, 2), strides=(2, 2))
    return self.fc(layers.global_pool(x)), seen
