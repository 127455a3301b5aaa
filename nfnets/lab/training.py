"""Trains the networks of this room, and a person's: SGD with Nesterov's momentum, and AGC where a strength is given.

It does not use the step of nfnets.train, which takes networks of nfnets.models and no others, and a step at a time. Here a whole
training is one program, networks are of any kind, and experiments look at parameters before and after a step.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from nfnets.agc import agc, named_leaves
from nfnets.lab.task import Data
from nfnets.optim.groups import by_path

Array = jax.Array
Params = Any  # a pytree of float32 arrays: nested dicts with the names of the network's attributes
# (parameters before a step, after it, images, labels, key of the step's noise) → a pytree of arrays
Watch = Callable[[Params, Params, Array, Array, Array], Any]
# (schedule of the learning rate, strength, parameters) → optimizer
Optimizer = Callable[[optax.Schedule, Array, Params], optax.GradientTransformation]
MOMENTUM = 0.9
# Training batches of which running statistics are made. They move by a tenth each, so that 0.5 % of the initial ones is left.
AVERAGED = 50
CLASSIFIER = r"(^|/)(fc|head|classifier)/kernel$"  # its weight, in a person's network by these names
# Networks of lab.deep hold all blocks of a stage in one array, whose first axis is the block.
_FIXUP = r"(^|/)(fixup_bias|biases/\d+|gain|fc/bias)$"  # its biases and scales, in networks of lab.deep
_UNITS = {"^blocks/.*kernel$": (0, -1), "^blocks/": (0,)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
  """How long to train, and on what.

  Attributes:
    batch: images a step.
    steps: how many, the first `warmup` of them with a linearly rising learning rate; a cosine takes it to 0 at the end.
  """

  batch: int
  steps: int
  warmup: int = 5


class Trainer:
  """Trains one architecture; each training is one call of a program that is compiled once.

  Args:
    make: turns a key into a network that maps images to logits, called as network(images, key=key).
    data: what it sees.
    recipe: how long.
    watch: looks at every `every`-th step, the first one included.
    every: see `watch`.
    optimizer: makes one, called as `sgd`, which None is.
  """

  def __init__(
    self,
    make: Callable[[Array], nnx.Module],
    data: Data,
    recipe: Recipe,
    *,
    watch: Watch | None = None,
    every: int = 1,
    optimizer: Optimizer | None = None,
  ):
    self.recipe, self.data, self.watch, self._every = recipe, data, watch, every
    self._optimizer = optimizer or sgd
    self._graph, self._template, self._rest = nnx.split(make(jax.random.key(0)), nnx.Param, ...)
    self._init = jax.jit(lambda key: nnx.to_pure_dict(nnx.split(make(key), nnx.Param, ...)[1]))
    self._descend = jax.jit(self._train)
    self._logits_of = jax.jit(self._answer, static_argnums=3)
    self._averages_of = jax.jit(self._averages)

  def init(self, seed: int) -> Params:
    """New weights."""
    return self._init(jax.random.key(seed))

  def logits(self, params: Params, images: Array, key: Array | None = None) -> Array:
    """The network's outputs, float32 [batch, classes]; a normalizer uses the statistics of these images."""
    return self.model(params)(images, key=key).astype(jnp.float32)

  def model(self, params: Params, rest: Any = None) -> Any:
    """The network with these parameters, and with `rest` as its other state."""
    state = jax.tree.map(lambda x: x, self._template)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(self._graph, state, self._rest if rest is None else rest, copy=True)

  def loss(self, params: Params, images: Array, labels: Array, key: Array | None = None) -> Array:
    """The mean cross-entropy, float32 []."""
    return cross_entropy(self.logits(params, images, key), labels)

  def train(
    self, params: Params, order: Array, rate: float, strength: float = math.inf, seed: int = 0
  ) -> tuple[Params, Any, Any]:
    """Trains from `params`.

    Args:
      params: of `init`; they stay as they are.
      order: int32 [steps, batch], numbers of training images; see `batches`.
      rate: the highest learning rate.
      strength: λ of AGC, which leaves the classifier alone; infinite: none.
      seed: of the noise of noisy normalizers.

    Returns:
      The parameters after the last step; the loss of each step, float32 [steps]; and what `watch` saw, each array with a first
      axis for the steps that it looked at, None without it.
    """
    params, (losses, seen) = self._descend(params, order, jnp.float32(rate), jnp.float32(strength), jax.random.key(seed))
    seen = jax.tree.map(lambda x: np.asarray(x)[:: self._every], seen)
    return params, np.asarray(losses), seen

  def test(self, params: Params, batch: int = 360, *, running: bool = False) -> tuple[float, float]:
    """(Accuracy, mean cross-entropy) on the test images, `batch` at a time, whose statistics a normalizer uses; without noise.

    With `running` it uses the moving averages of the statistics of AVERAGED training batches instead, as in use. They are taken
    of the network as it is now, and not along the way.
    """
    images, labels = self.data.test
    rest = self._rest
    if running and nnx.state(rest, nnx.BatchStat):
      order = batches(len(self.data.train[1]), dataclasses.replace(self.recipe, steps=AVERAGED), 0)
      rest = self._averages_of(params, order)
    outputs = [self._logits_of(params, images[i : i + batch], rest, running) for i in range(0, len(images), batch)]
    logits = jnp.concatenate(outputs)
    return float(jnp.mean(jnp.argmax(logits, axis=-1) == labels)), float(cross_entropy(logits, labels))

  def _answer(self, params: Params, images: Array, rest: Any, running: bool) -> Array:
    """The network's outputs in a test, float32 [batch, classes]."""
    model = self.model(params, rest)
    model.set_attributes(uses_running_statistics=running, raise_if_not_found=False)
    return model(images).astype(jnp.float32)

  def _averages(self, params: Params, order: Array) -> Any:
    """The network's state but for its parameters, after training batches int32 [batches, batch] have moved its averages."""

    def look(rest: Any, chosen: Array) -> tuple[Any, None]:
      model = self.model(params, rest)
      model(self.data.train[0][chosen])
      return nnx.split(model, nnx.Param, ...)[2], None

    return jax.lax.scan(look, self._rest, order)[0]

  def _train(self, params: Params, order: Array, rate: Array, strength: Array, key: Array) -> tuple[Params, Any]:
    (images, labels), recipe = self.data.train, self.recipe
    rising = lambda count: (count + 1) / recipe.warmup
    schedule = lambda count: rate * jnp.minimum(rising(count), 0.5 * (1 + jnp.cos(jnp.pi * count / recipe.steps)))
    optimizer = self._optimizer(schedule, strength, params)

    def step(carry: tuple[Params, Any], place: tuple[Array, Array]) -> tuple[tuple[Params, Any], Any]:
      params, state = carry
      number, chosen = place
      shown = images[chosen], labels[chosen], jax.random.fold_in(key, number)
      # Without the barrier XLA fuses every gradient into each of the norms that read it, and compiles several times longer.
      value, grads = jax.lax.optimization_barrier(jax.value_and_grad(self.loss)(params, *shown))
      updates, state = optimizer.update(grads, state, params)
      after = optax.apply_updates(params, updates)
      return (after, state), (value, self._look(number, params, after, *shown))

    (params, _), seen = jax.lax.scan(step, (params, optimizer.init(params)), (jnp.arange(recipe.steps), order))
    return params, seen

  def _look(self, number: Array, *shown: Any) -> Any:
    """What `watch` sees at a step that it looks at, and zeros at the others, which costs nothing."""
    if self.watch is None:
      return None
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(self.watch, *shown))
    return jax.lax.cond(number % self._every == 0, self.watch, lambda *shown: nothing, *shown)


def units_of(params: Params) -> dict[str, Sequence[int] | str] | None:
  """AGC's `unit_axes` for these parameters."""
  return dict(_UNITS) if "blocks" in params else None


def clip(strength: Array, params: Params) -> optax.GradientTransformation:
  """AGC without the classifier's weight; an infinite strength λ, float32 [], clips nothing."""
  classifier = [path for path, _, _ in named_leaves(params) if re.search(CLASSIFIER, path)]
  exclude = CLASSIFIER if classifier else None
  return agc(lambda count: strength, exclude=exclude, unit_axes=units_of(params))


def sgd(schedule: optax.Schedule, strength: Array, params: Params) -> optax.GradientTransformation:
  """AGC → Nesterov's momentum → learning rate, a tenth of it for Fixup's biases and scales, as in its authors' code."""
  descent = optax.chain(clip(strength, params), optax.sgd(schedule, momentum=MOMENTUM, nesterov=True))
  if "fixup_bias" not in params:
    return descent
  scalars = by_path(params, lambda path: re.search(_FIXUP, path) is not None)
  return optax.chain(descent, optax.masked(optax.scale(0.1), scalars))


def cross_entropy(logits: Array, labels: Array) -> Array:
  """The mean over images: float [] of logits [batch, classes] and int labels [batch]."""
  return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def batches(count: int, recipe: Recipe, seed: int) -> Array:
  """Numbers of training images, int32 [steps, batch]: permutations of all `count`, one after the other."""
  rng, wanted = np.random.default_rng(seed), recipe.steps * recipe.batch
  order = np.concatenate([rng.permutation(count) for _ in range(-(-wanted // count))])
  return jnp.asarray(order[:wanted].reshape(recipe.steps, recipe.batch), jnp.int32)
