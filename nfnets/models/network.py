"""What all networks share: the way from stem over blocks and tail to pool and classifier, and the taps into it.

P1 and P2 are the papers that layers.py names.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfnets.models import layers, loops

Array = jax.Array
Tap = Callable[[str, Array], None]  # is called with a layer's name ("stem", "blocks/3/conv1", "blocks/3", …) and its output


def no_tap(name: str, x: Array) -> None:
  """The default tap, which keeps nothing and computes nothing."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpec:
  """What a residual block must know of its place in the network."""

  # number of blocks before it
  index: int
  # input and output channels
  in_features: int
  features: int
  strides: int
  # standard deviation of its input at initialisation, as theory has it
  expected_std: float
  # of stochastic depth
  drop_rate: float


def block_specs(
  *, depth: Sequence[int], width: Sequence[int], strides: Sequence[int], in_features: int, alpha: float, stochastic_depth: float
) -> Iterator[BlockSpec]:
  """Yields the blocks of all stages in order, with the signal's deviation as theory has it (P1, section 4.2; P2, section 2).

  A block adds alpha² to the variance. A stage's first block has a convolution in its shortcut, with which it starts again from 1.
  The rate of stochastic depth grows linearly from 0 at the first block.

  Args:
    depth, width, strides: blocks, output channels and strides of each stage.
    in_features: channels that the first block reads.
    alpha: scale of the residual branches.
    stochastic_depth: the rate that a block after the last would have.
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
  """Runs the block; its activations are not kept for the backward pass but computed again there."""
  return block(x, key, train)


def _with_numbers(graph: nnx.GraphDef, state: nnx.State, numbers: dict[str, Array]) -> Any:
  """The block of a graph, with a loop's numbers where the graph holds those of one block, or of all."""
  block = nnx.merge(graph, state)
  for name, value in numbers.items():
    object.__setattr__(block, name, value)
  return block


class Network(nnx.Module):
  """A stem, residual blocks, a tail and a classifier `fc`; subclasses build them and say what stem and tail do.

  A network holds no random state. For `train=True` it is given `rngs`: an nnx.Rngs (its "dropout" stream), a jax.random key, or
  keys [batch], one for each image.
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
    scan: bool,
    dtype,
    rngs: layers.ParamKeys,
  ):
    self.blocks: nnx.List[Any] = nnx.List(blocks)
    self.num_classes, self.drop_rate, self.remat, self.dtype = num_classes, drop_rate, remat, jnp.dtype(dtype)
    self.runs = loops.equal_blocks(blocks) if scan else tuple((i, i + 1) for i in range(len(blocks)))
    self.stacked = False
    self.fc = layers.linear(features, num_classes, stddev=fc_stddev, rngs=rngs)
    self.fc.kernel.set_metadata(agc=False)  # P2, section 4.1: the classifier's weight is not clipped

  def stack(self) -> None:
    """Stacks the parameters of equal blocks (`loops.stack`), in place: the first block of a run has those of all of it.

    Names and shapes are then other than the variant's, so that this is for training alone, which unstacks what it saves.
    """
    state = loops.stack(nnx.state(self, nnx.Param), self.runs)
    for start, stop in self.runs:
      if stop - start > 1:
        blocks = self.blocks[start:stop]
        for name, numbers in loops.numbers(blocks).items():
          setattr(blocks[0], name, numbers)
        self.blocks[start] = nnx.merge(nnx.split(blocks[0])[0], state["blocks"][start])
        self.blocks[start + 1 : stop] = [None] * (stop - start - 1)
    self.stacked = True

  @abc.abstractmethod
  def run_stem(self, x: Array, train: bool, tap: Tap) -> Array:
    """Turns images [B, H, W, 3] into what the first block reads."""

  @abc.abstractmethod
  def run_tail(self, x: Array, key: Array | None, train: bool, tap: Tap) -> Array:
    """Turns what the last block gives into the features that are pooled."""

  def classify(self, pool: Array) -> Array:
    """Turns pooled features, float32 [B, C], into logits."""
    return self.fc(pool)

  def __call__(self, images: Array, *, train: bool = False, rngs: nnx.Rngs | Array | None = None) -> Array:
    """Computes the logits, float32 [batch, num_classes].

    Args:
      images: [batch, height, width, 3], normalised, of any float dtype.
      train: whether dropout and stochastic depth act, and BatchNorm uses the batch's statistics.
      rngs: for dropout and stochastic depth, see the class.

    Raises:
      ValueError: images have another shape, or `train=True` lacks `rngs` where the network draws random numbers.
    """
    return self.outputs(images, train=train, rngs=rngs)["logits"]

  def outputs(
    self, images: Array, *, train: bool = False, rngs: nnx.Rngs | Array | None = None, tap: Tap = no_tap
  ) -> dict[str, Array]:
    """Computes {"features": [B, h, w, C], "pool": float32 [B, C], "logits": float32 [B, classes]}.

    Under jit, those that are not used cost nothing.

    Args:
      images, train, rngs: as for a call, with the same errors.
      tap: tap(name, x) is called with every layer's output, in order; it may store, reduce or check it.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
      raise ValueError(f"images: expected the shape [batch, height, width, 3], got {images.shape}")
    key = self._key(rngs) if train else None
    with jax.named_scope("stem"):
      x = self.run_stem(images.astype(self.dtype), train, tap)
    tap("stem", x)
    for start, stop in self.runs:
      if stop - start > 1 and tap is no_tap:
        with jax.named_scope(f"blocks/{start}"):
          x = self._run_in_a_loop(x, key, train, start, stop)
      else:
        for i in range(start, stop):
          x = self._run_block(x, key, train, i, tap)
    with jax.named_scope("tail"):
      features = self.run_tail(x, key, train, tap)
      pool = dropped = layers.global_pool(features)
    tap("pool", pool)
    if train and self.drop_rate > 0:
      assert key is not None  # `_key` has raised an error without it
      keep = layers.bernoulli(layers.fold_in(key, len(self.blocks)), 1 - self.drop_rate, pool.shape)
      dropped = jnp.where(keep, pool / (1 - self.drop_rate), 0)
    with jax.named_scope("fc"):
      logits = self.classify(dropped)
    tap("logits", logits)
    return {"features": features, "pool": pool, "logits": logits}

  def _run_block(self, x: Array, key: Array | None, train: bool, i: int, tap: Tap) -> Array:
    block, block_key = self._block(i), None if key is None else layers.fold_in(key, i)
    with jax.named_scope(f"blocks/{i}"):
      if self.remat and tap is no_tap:
        x = _run_again(block, x, block_key, train)
      else:
        x = block(x, block_key, train, lambda name, value: tap(f"blocks/{i}/{name}", value))
    tap(f"blocks/{i}", x)
    return x

  def _block(self, i: int) -> Any:
    """The block `i`, which is taken out of its stack where it is in one."""
    start, stop = next(run for run in self.runs if run[0] <= i < run[1])
    if not self.stacked or stop - start == 1:
      return self.blocks[i]
    graph, state, numbers = self._stack_of(start, stop)
    return _with_numbers(graph, *jax.tree.map(lambda x: x[i - start], (state, numbers)))

  def _stack_of(self, start: int, stop: int) -> tuple[nnx.GraphDef, nnx.State, dict[str, Array]]:
    """What the blocks [start, stop) are merged of: the graph of each, and their parameters and numbers, stacked."""
    blocks = self.blocks[start:stop]
    graph, state = nnx.split(blocks[0])
    if self.stacked:
      numbers = {name: getattr(blocks[0], name) for name in loops.numbers(blocks[:1])}
    else:
      numbers = loops.numbers(blocks)
      state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.split(block)[1] for block in blocks))
    return graph, state, {name: jnp.asarray(values) for name, values in numbers.items()}

  def _run_in_a_loop(self, x: Array, key: Array | None, train: bool, start: int, stop: int) -> Array:
    """Runs the blocks [start, stop), which differ in parameters and in `loops.numbers` alone, in one loop."""
    graph, state, numbers = self._stack_of(start, stop)

    def body(x, inputs):
      state, index, numbers = inputs
      block = _with_numbers(graph, state, numbers)
      return block(x, None if key is None else layers.fold_in(key, index), train), None

    body = jax.checkpoint(body) if self.remat else body
    return jax.lax.scan(body, x, (state, jnp.arange(start, stop), numbers))[0]

  def _key(self, rngs: nnx.Rngs | Array | None) -> Array | None:
    """The key, or the keys of the images, of a training pass; raises ValueError where one is needed and missing."""
    if isinstance(rngs, nnx.Rngs):
      return rngs.dropout()
    draws = lambda block: np.max(getattr(block, "drop_rate", 0)) > 0 or getattr(block, "draws", False)
    if rngs is None and (self.drop_rate > 0 or any(map(draws, self.blocks))):
      raise ValueError(
        "train=True draws dropout, stochastic depth or noise, but rngs is None: pass rngs=nnx.Rngs(seed) or a jax.random key, "
        "or create the network with drop_rate=0, stochastic_depth=0 and without noisy_batch"
      )
    return rngs


def signal_statistics(
  network: Network, images: Array, *, train: bool = False, rngs: nnx.Rngs | Array | None = None
) -> dict[str, dict[str, Array]]:
  """Computes each block's signal statistics, of which signal propagation plots are made (P1, section 3).

  Args:
    network: any; with skip gains of 0, as they are at initialisation, blocks add nothing to the signal.
    images, train, rngs: as for a call of the network.

  Returns:
    Float32 scalars for "stem" and each "blocks/i". "mean_sq" is the mean over channels of the squared channel mean, "var" that of
    the channel variance (over batch and space), and of blocks alone, "residual_var" is the same variance at the end of the
    residual branch, before stochastic depth, skip_gain and alpha.
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
