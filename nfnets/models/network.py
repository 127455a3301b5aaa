"""What every network of the house shares: the walk stem → blocks → tail → pool → classifier, and the taps into it."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from nfnets.models import layers

Array = jax.Array
Tap = Callable[[str, Array], None]  # called with a name ("stem", "blocks/3/conv1", "blocks/3", …) and that layer's output


def no_tap(name: str, x: Array) -> None:
  """The default tap: nothing is kept, nothing is computed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpec:
  """Where a residual block stands. expected_std: of its input at initialisation; drop_rate: of stochastic depth."""

  index: int
  in_features: int
  features: int
  strides: int
  expected_std: float
  drop_rate: float


def block_specs(
  *, depth: Sequence[int], width: Sequence[int], strides: Sequence[int], in_features: int, alpha: float, stochastic_depth: float
) -> Iterator[BlockSpec]:
  """The blocks of all stages in order, with the signal's deviation as theory has it (P1, section 4.2; P2, section 2).

  A block adds alpha² to the variance. A stage's first block has a convolution in its shortcut, which starts it again from 1.
  Stochastic depth grows linearly from 0 at the first block.
  """
  index, expected_std = 0, 1.0
  for stage_depth, stage_width, stage_strides in zip(depth, width, strides, strict=True):
    for i in range(stage_depth):
      yield BlockSpec(
        index=index,
        in_features=in_features,
        features=stage_width,
        strides=stage_strides if i == 0 else 1,
        expected_std=expected_std,
        drop_rate=stochastic_depth * index / sum(depth),
      )
      if i == 0:
        expected_std = 1.0
      expected_std = (expected_std**2 + alpha**2) ** 0.5
      index, in_features = index + 1, stage_width


@functools.partial(nnx.remat, static_argnums=3)
def _run_again(block: nnx.Module, x: Array, key: Array | None, train: bool) -> Array:
  """The block, its activations computed anew in the backward pass instead of kept."""
  return block(x, key, train)


class Network(nnx.Module):
  """A stem, residual blocks, a tail and a classifier `fc`; subclasses build them and say what stem and tail do.

  Holds no random state: with `train=True` pass `rngs`, an nnx.Rngs (its "dropout" stream), a jax.random key, or a key a sample.
  """

  def __init__(
    self,
    *,
    blocks: Sequence[nnx.Module],
    features: int,
    num_classes: int,
    drop_rate: float,
    fc_stddev: float,
    remat: bool,
    dtype,
    rngs: layers.ParamKeys,
  ):
    self.blocks = nnx.List(blocks)
    self.num_classes, self.drop_rate, self.remat, self.dtype = num_classes, drop_rate, remat, jnp.dtype(dtype)
    self.fc = layers.linear(features, num_classes, stddev=fc_stddev, rngs=rngs)
    self.fc.kernel.set_metadata(agc=False)  # P2, section 4.1: the classifier's weight is not clipped

  @abc.abstractmethod
  def run_stem(self, x: Array, train: bool, tap: Tap) -> Array:
    """[B, H, W, 3] → what the first block reads."""

  @abc.abstractmethod
  def run_tail(self, x: Array, train: bool, tap: Tap) -> Array:
    """What the last block gives → the features that are pooled."""

  def classify(self, pool: Array) -> Array:
    return self.fc(pool)

  def __call__(self, images: Array, *, train: bool = False, rngs: nnx.Rngs | Array | None = None) -> Array:
    """Logits, float32 [batch, num_classes], of images [batch, height, width, 3] (normalised, any float dtype).

    Raises ValueError for images of another rank, and for `train=True` without `rngs` where the network draws random numbers.
    """
    return self.outputs(images, train=train, rngs=rngs)["logits"]

  def outputs(
    self, images: Array, *, train: bool = False, rngs: nnx.Rngs | Array | None = None, tap: Tap = no_tap
  ) -> dict[str, Array]:
    """{"features": [B, h, w, C], "pool": float32 [B, C], "logits": float32 [B, classes]}; unused ones cost nothing under jit.

    `tap(name, x)` is called at every layer's output, in order; it may store, reduce or check what it is shown.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
      raise ValueError(f"images must be [batch, height, width, 3], got shape {images.shape}")
    key = self._key(rngs) if train else None
    with jax.named_scope("stem"):
      x = self.run_stem(images.astype(self.dtype), train, tap)
    tap("stem", x)
    for i, block in enumerate(self.blocks):
      block_key = None if key is None else layers.fold_in(key, i)
      with jax.named_scope(f"blocks/{i}"):
        if self.remat and tap is no_tap:
          x = _run_again(block, x, block_key, train)
        else:
          x = block(x, block_key, train, lambda name, value, i=i: tap(f"blocks/{i}/{name}", value))
      tap(f"blocks/{i}", x)
    with jax.named_scope("tail"):
      features = self.run_tail(x, train, tap)
      pool = dropped = layers.global_pool(features)
    tap("pool", pool)
    if train and self.drop_rate > 0:
      assert key is not None  # `_key` has asked for one
      keep = layers.bernoulli(layers.fold_in(key, len(self.blocks)), 1 - self.drop_rate, pool.shape)
      dropped = jnp.where(keep, pool / (1 - self.drop_rate), 0)
    with jax.named_scope("fc"):
      logits = self.classify(dropped)
    tap("logits", logits)
    return {"features": features, "pool": pool, "logits": logits}

  def _key(self, rngs: nnx.Rngs | Array | None) -> Array | None:
    if isinstance(rngs, nnx.Rngs):
      return rngs.dropout()
    if rngs is None and (self.drop_rate > 0 or any(getattr(block, "drop_rate", 0) > 0 for block in self.blocks)):
      raise ValueError(
        "train=True draws dropout and stochastic depth: pass rngs=nnx.Rngs(seed) or a jax.random key "
        "(or set drop_rate=0 and stochastic_depth=0)"
      )
    return rngs


def signal_statistics(
  network: Network, images: Array, *, train: bool = False, rngs: nnx.Rngs | Array | None = None
) -> dict[str, dict[str, Array]]:
  """Per-block signal statistics (P1, section 3: signal propagation plots), float32 scalars, for "stem" and each "blocks/i".

  mean_sq: mean over channels of the squared channel mean; var: mean over channels of the channel variance (over batch and
  space); residual_var: the same variance at the end of the residual branch, before stochastic depth, skip_gain and alpha.
  """
  statistics: dict[str, dict[str, Array]] = {}

  def tap(name: str, x: Array) -> None:
    place, _, last = name.rpartition("/")
    if name == "stem" or place == "blocks":
      x = x.astype(jnp.float32)
      entry = statistics.setdefault(name, {})
      entry["mean_sq"] = jnp.mean(jnp.mean(x, axis=(0, 1, 2)) ** 2)
      entry["var"] = jnp.mean(jnp.var(x, axis=(0, 1, 2)))
    elif last == "residual":
      statistics[place] = {"residual_var": jnp.mean(jnp.var(x.astype(jnp.float32), axis=(0, 1, 2)))}

  network.outputs(images, train=train, rngs=rngs, tap=tap)
  return statistics
