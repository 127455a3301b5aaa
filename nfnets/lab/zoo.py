"""Trains any nnx network that is called as network(images, train=…), its running statistics included."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from nfnets.agc import agc, named_leaves
from nfnets.lab.task import Data
from nfnets.lab.training import CLASSIFIER, MOMENTUM, Recipe, batches, cross_entropy

Array = jax.Array


class ZooTrainer:
  """SGD with Nesterov's momentum, warm-up and cosine; compiled once.

  Args:
    make: turns a key into a network of float32 parameters, which needs no randomness when it trains.
    data: what it sees.
    recipe: how long.
    rate: the highest learning rate.
    strength: AGC's λ, of all but the classifier's weight; infinite: no clipping.
    scalars: whether AGC clips parameters of one number, such as the gains of branches, too.
  """

  def __init__(
    self,
    make: Callable[[Array], nnx.Module],
    data: Data,
    recipe: Recipe,
    rate: float,
    strength: float = math.inf,
    scalars: bool = True,
  ):
    self.data, self.recipe = data, recipe
    self._graph, state = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))))
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, recipe.warmup, recipe.steps)
    self._optimizer = optax.sgd(schedule, momentum=MOMENTUM, nesterov=True)
    if math.isfinite(strength):
      leaves = named_leaves(nnx.split_state(state, nnx.Param, ...)[0])
      left_out = [path for path, leaf, _ in leaves if re.search(CLASSIFIER, path) or (leaf.ndim == 0 and not scalars)]
      exclude = "|".join(f"^{re.escape(path)}$" for path in left_out) or None
      self._optimizer = optax.chain(agc(strength, exclude=exclude), self._optimizer)
    self._init, self._run = jax.jit(lambda key: nnx.state(make(key))), jax.jit(self._descend)
    self.logits = jax.jit(self._logits, static_argnums=2)  # (state, images, train) → float32 [batch, classes]

  def init(self, seed: int) -> nnx.State:
    """New weights and statistics."""
    return self._init(jax.random.key(seed))

  def fit(self, seed: int) -> nnx.State:
    """Trains from new weights: parameters and running statistics."""
    return self._run(self.init(seed), batches(len(self.data.train[1]), self.recipe, seed))

  def accuracy(self, state: nnx.State) -> float:
    """The share of test images that is recognised, in evaluation."""
    images, labels = self.data.test
    return float(jnp.mean(jnp.argmax(self.logits(state, images, False), axis=-1) == labels))

  def _descend(self, state: nnx.State, order: Array) -> nnx.State:
    params, stats = nnx.split_state(state, nnx.Param, ...)
    images, labels = self.data.train

    def loss(params: nnx.State, stats: nnx.State, chosen: Array) -> tuple[Array, nnx.State]:
      network: Any = nnx.merge(self._graph, params, stats, copy=True)
      value = cross_entropy(network(images[chosen], train=True), labels[chosen])
      return value, nnx.state(network, nnx.Not(nnx.Param))

    def step(carry: Any, chosen: Array) -> tuple[Any, None]:
      params, stats, state = carry
      grads, stats = jax.lax.optimization_barrier(jax.grad(loss, has_aux=True)(params, stats, chosen))
      updates, state = self._optimizer.update(grads, state, params)
      return (optax.apply_updates(params, updates), stats, state), None

    (params, stats, _), _ = jax.lax.scan(step, (params, stats, self._optimizer.init(params)), order)
    return nnx.merge_state(params, stats)

  def _logits(self, state: nnx.State, images: Array, train: bool) -> Array:
    network: Any = nnx.merge(self._graph, state, copy=True)
    return network(images, train=train).astype(jnp.float32)
