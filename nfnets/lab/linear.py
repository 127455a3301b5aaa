"""A deep linear network, on which theory about normalizers is exact: random matrices with a normalizer after each."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nfnets.lab import norms
from nfnets.lab.measures.geometry import similarity
from nfnets.models import layers

Array = jax.Array


class LinearNetwork(nnx.Module):
  """A deep linear network that can be trained: pixels → width → … → width → classes, each layer but the last normalized.

  `norm` acts on activations or on weights; what acts on residual branches finds none here.
  """

  def __init__(self, inputs: int, width: int, depth: int, norm: str, key: Array, *, num_classes: int = 10):
    keys = layers.ParamKeys(key)
    sizes = [inputs] + [width] * depth
    plain = norms.lookup(norm)[0].weights == "plain"

    def make(before: int, after: int) -> nnx.Module:
      if plain:
        return layers.linear(before, after, stddev=before**-0.5, rngs=keys)
      return norms.conv(norm, before, after, 1, act="identity", keys=keys)  # a matrix product at each place

    self.layers = nnx.List([make(before, after) for before, after in zip(sizes, sizes[1:], strict=False)])
    self.norms = nnx.List([norms.make(norm, width, keys) for _ in range(depth)])
    self.fc = layers.linear(width, num_classes, stddev=width**-0.5, rngs=keys)

  def __call__(self, images: Array, *, key: Array | None = None) -> Array:
    """Computes logits, float32 [batch, classes], of images [batch, …] with `inputs` numbers each; `key` is for noise."""
    x = images.reshape(len(images), -1)
    for i, layer in enumerate(self.layers):
      place = None if key is None else jax.random.fold_in(key, i)
      x = norms.normalize(self.norms[i], layer(x[:, None, None, :]), place)[:, 0, 0, :]
    return self.fc(x)


def layer_similarities(norm: str, inputs: Array, depth: int, key: Array) -> dict[str, Array]:
  """Measures how alike the samples are after each layer H ← N(H W) of a random linear network (Daneshmand et al. 2021, eq. 1).

  Args:
    norm: N, a name of norms.NORMS that acts on activations ("batch_uncentred" is theirs) or on weights, or "none"; on samples
      without space "instance" would leave nothing.
    inputs: H, float32 [samples, width].
    depth: layers.
    key: of the weights W [width, width] ~ N(0, 1 / width), drawn anew for each layer.

  Returns:
    Those of `similarity`, each float32 [depth].
  """
  width = inputs.shape[1]
  module = norms.make(norm, width, layers.ParamKeys(jax.random.key(0)))
  graph, state = (None, None) if module is None else nnx.split(module)
  plain = norms.lookup(norm)[0].weights == "plain"

  def layer(hidden: Array, key: Array) -> tuple[Array, dict[str, Array]]:
    weight_key, noise_key = jax.random.split(key)
    if plain:
      hidden = jnp.matmul(hidden, jax.random.normal(weight_key, (width, width)) / width**0.5, precision="highest")
    else:
      product: Any = norms.conv(norm, width, width, 1, act="identity", keys=layers.ParamKeys(weight_key))
      hidden = product(hidden[:, None, None, :])[:, 0, 0, :]
    if graph is not None:
      normalizer: Any = nnx.merge(graph, state)
      hidden = normalizer(hidden[:, None, None, :], noise_key)[:, 0, 0, :]
    else:
      hidden = hidden / jnp.sqrt(jnp.mean(hidden**2))  # a common factor, which no measure sees, and which avoids overflow
    return hidden, similarity(hidden)

  return jax.lax.scan(layer, inputs, jax.random.split(key, depth))[1]
