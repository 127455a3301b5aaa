"""A residual network, or a plain one, of any depth, that compiles at once: its blocks are stacked and run by jax.lax.scan."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from nfnets.errors import UserError
from nfnets.lab import norms
from nfnets.models import layers

Array = jax.Array
Probe = Callable[[Array, Array], Any]  # (output of a block, its residual branch), both [B, H, W, C] → a pytree of arrays


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeepConfig:
  """What a Deep is made of."""

  # blocks in all, which `stages` divides
  depth: int
  # channels
  width: int
  # a name of norms.NORMS
  norm: str = "batch"
  # convolutions of 3×3 a block, 1 or 2
  convs: int = 1
  # With several, each begins with a block whose shortcut is a convolution of the activated input, as in transitions of
  # NF-ResNets; neither size nor width changes there. With one, there is none.
  stages: int = 1
  # whether blocks add to their input; else each gives its branch alone
  residual: bool = True
  # of alpha/beta
  alpha: float = 0.2
  activation: str = "relu"
  num_classes: int = 10
  # channels of the images
  in_features: int = 3

  def expected_stds(self) -> list[float]:
    """The standard deviation of each block's input at initialization under alpha/beta (Brock et al. 2021a, section 4.2)."""
    stds, expected_std = [], 1.0
    for block in range(self.depth):
      stds.append(expected_std)
      if self.stages > 1 and block % (self.depth // self.stages) == 0:
        expected_std = 1.0
      expected_std = (expected_std**2 + self.alpha**2) ** 0.5
    return stds


class Block(nnx.Module):
  """Once or twice normalizer → activation → 3×3, scaled as the normalizer's `branch` says, added to the shortcut."""

  def __init__(self, config: DeepConfig, keys: Any, *, transition: bool = False):
    self.row, _ = norms.lookup(config.norm)
    self.alpha, self.residual = config.alpha, config.residual
    self.activation = norms.activation(config.norm, config.activation)
    width, fixup = config.width, self.row.branch == "fixup"
    make = lambda size, factor=1.0: norms.conv(config.norm, width, width, size, act=config.activation, factor=factor, keys=keys)
    # Fixup: all but a branch's last kernel shrink by depth^(-1 / (2m - 2)), m = 2, and the last is zero (Zhang et al. 2019).
    factors = (config.depth**-0.5, 0.0) if fixup else (1.0,) * config.convs
    self.norms = nnx.List([norms.make(config.norm, width, keys) for _ in factors])
    self.convs = nnx.List([make(3, factor) for factor in factors])
    self.shortcut = make(1) if transition else None
    scalar = lambda value: nnx.Param(layers.full(value)(None, ()))
    gains = {"skip_init": 0.0, "skip_init_root": config.depth**-0.5, "fixup": 1.0}
    self.gain = scalar(gains[self.row.branch]) if self.row.branch in gains else None
    self.biases = nnx.List([scalar(0.0) for _ in range(2 * len(factors))]) if fixup else None

  def __call__(self, x: Array, beta: Array, key: Array | None) -> tuple[Array, Array]:
    """Returns (output, residual branch); `beta`, float32 [], counts for alpha/beta alone."""
    out, shortcut = x, x
    for i, conv in enumerate(self.convs):
      bias = (0.0, 0.0) if self.biases is None else (self.biases[2 * i][...], self.biases[2 * i + 1][...])
      place = None if key is None else jax.random.fold_in(key, i)
      out = self.activation(norms.normalize(self.norms[i], out + bias[0], place)) + bias[1]
      if i == 0 and self.row.branch == "alpha_beta":
        out = out * beta
      if i == 0 and self.shortcut is not None:
        shortcut = self.shortcut(out)
      out = conv(out)
    if not self.residual:
      return out, out
    branch = out if self.gain is None else out * self.gain[...]
    branch = branch * self.alpha if self.row.branch == "alpha_beta" else branch
    return shortcut + branch, out


class Deep(nnx.Module):
  """Stem 3×3 → blocks → normalizer → activation → mean over space → classifier.

  `blocks` holds the parameters of all blocks of one kind, each with a first axis for the block: `stages` lists of them, and
  `transitions`, the first block of each stage, where there are several.
  """

  def __init__(self, config: DeepConfig, key: Array):
    if config.depth < 1 or config.depth % config.stages or config.convs not in (1, 2):
      raise UserError(f"depth={config.depth}, stages={config.stages}, convs={config.convs}: stages divide depth; convs is 1 or 2")
    self.config = config
    keys = layers.ParamKeys(key)
    self.stem = norms.conv(config.norm, config.in_features, config.width, 3, act="identity", keys=keys)
    several = config.stages > 1
    rest = config.depth // config.stages - several
    self.transitions = nnx.List([Block(config, keys, transition=True) for _ in range(config.stages if several else 0)])
    self.blocks = nnx.List([_stack(config, jax.random.split(keys.params(), rest)) for _ in range(config.stages if rest else 0)])
    self.norm = norms.make(config.norm, config.width, keys)
    self.activation = norms.activation(config.norm, config.activation)
    fixup = norms.lookup(config.norm)[0].branch == "fixup"  # whose classifier is 0, and has a scalar bias before it
    self.fixup_bias = nnx.Param(layers.full(0.0)(None, ())) if fixup else None
    stddev = 0.0 if fixup else config.width**-0.5
    self.fc = layers.linear(config.width, config.num_classes, stddev=stddev, rngs=keys)

  def __call__(self, images: Array, *, key: Array | None = None) -> Array:
    """Computes logits, float32 [batch, classes], of images [batch, height, width, in_features]; `key` is for noise."""
    x, _ = self.run(images, key=key)
    x = self.activation(norms.normalize(self.norm, x, None if key is None else jax.random.fold_in(key, 1 << 20)))
    pool = layers.global_pool(x)
    return self.fc(pool if self.fixup_bias is None else pool + self.fixup_bias[...])

  def run(
    self, images: Array, *, key: Array | None = None, probe: Probe | None = None, rescale: bool = False
  ) -> tuple[Array, Any]:
    """Runs stem and blocks.

    Args:
      images: float32 [batch, height, width, in_features].
      key: for noise.
      probe: what is kept of each block.
      rescale: divides the signal by its root mean square after each block, and gives log2 of what was taken out as well. Exact
        where the blocks are positively homogeneous, f(s·x) = s·f(x), as without a normalizer: what grows beyond any number
        that float32 holds is so still known.

    Returns:
      (features [batch, height, width, width], what the probe gave with a first axis for the block; with `rescale` it is
      (log2 of the factors taken out before that block's output was seen, float32 [depth], that)).
    """
    x, scale, seen = self.stem(images), jnp.zeros(()), []
    betas = 1 / jnp.asarray(self.config.expected_stds())
    per_stage, several = self.config.depth // self.config.stages, self.config.stages > 1

    def advance(block: Block, carry: tuple[Array, Array], beta: Array, number: Array | int):
      x, scale = carry
      out, branch = block(x, beta, None if key is None else jax.random.fold_in(key, number))
      kept = None if probe is None else probe(out, branch)
      kept = (scale, kept) if rescale else kept
      if rescale:
        size = jnp.sqrt(jnp.mean(out**2))
        out, scale = out / size, scale + jnp.log2(size)
      return (out, scale), kept

    for stage in range(self.config.stages):
      first = stage * per_stage
      if several:
        (x, scale), kept = advance(self.transitions[stage], (x, scale), betas[first], first)
        seen.append(jax.tree.map(lambda leaf: leaf[None], kept))
      if per_stage > several:
        graph, state = nnx.split(self.blocks[stage])
        numbers = jnp.arange(first + several, first + per_stage)

        def body(carry: tuple[Array, Array], part: Any, graph: Any = graph) -> Any:
          block = cast(Block, nnx.merge(graph, part[0]))
          carry, kept = advance(block, carry, part[1], part[2])
          return carry, (kept, nnx.state(block, nnx.BatchStat))

        (x, scale), (kept, running) = jax.lax.scan(body, (x, scale), (state, betas[numbers], numbers))
        nnx.update(self.blocks[stage], running)
        seen.append(kept)
    return x, None if probe is None else jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen)


def _stack(config: DeepConfig, keys: Array) -> nnx.Module:
  """Blocks of which every array has a first axis, one entry for each of `keys` [blocks]."""
  make = lambda key: nnx.split(Block(config, layers.ParamKeys(key)))[1]
  graph = nnx.split(nnx.eval_shape(lambda: Block(config, layers.ParamKeys(keys[0]))))[0]
  return nnx.merge(graph, jax.vmap(make)(keys))
