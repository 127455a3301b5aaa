"""NF-ResNet 26–600 (P1, 2101.08692, section 4): pre-activation ResNets with Scaled Weight Standardization, no normalization."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from nfnets.models import layers
from nfnets.models.dialect import Dialect, gate_channels, parts
from nfnets.models.network import BlockSpec, Network, Tap, block_specs, no_tap

Array = jax.Array


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NFResNetConfig:
  """A row of the variants' table."""

  # blocks of each stage
  depth: tuple[int, ...]
  # output channels of each stage; the stem has a quarter of the first
  width: tuple[int, ...] = (256, 512, 1024, 2048)
  # bottleneck channels / output channels
  bottleneck: float = 0.25
  # the stem: a convolution of this size, and whether a 3×3 max pool follows it
  stem_kernel: int = 7
  stem_strides: int = 2
  stem_pool: bool = True
  stage_strides: tuple[int, ...] = (1, 2, 2, 2)
  # gate at the end of a residual branch: squeeze-and-excite, efficient channel attention or none;
  # se_ratio = its hidden / its channels
  gate: Literal["se", "eca"] | None = None
  se_ratio: float = 0.25
  activation: str = "relu"
  # residual branches are scaled by alpha: variance grows by alpha² a block
  alpha: float = 0.2
  # probability to drop a residual branch, which grows linearly from 0 at the first block to about this at the last
  stochastic_depth: float = 0.1
  # rate of the dropout before the classifier
  drop_rate: float = 0.0
  # pixels a side
  train_resolution: int = 224
  test_resolution: int = 224
  # whose conventions, see dialect.py
  dialect: Dialect = "official"
  # compute each block's activations again in the backward pass instead of keeping them
  remat: bool = False
  # trace blocks of a stage that are equal once, and run them in a loop (jax.lax.scan)
  scan: bool = False


class NFResBlock(nnx.Module):
  """A bottleneck 1×1 → 3×3 → 1×1; a transition's shortcut is a strided 1×1 of the activated and scaled input (P1, appendix)."""

  def __init__(self, config: NFResNetConfig, spec: BlockSpec, *, dtype, rngs: layers.ParamKeys):
    in_features, features, strides, self.drop_rate = spec.in_features, spec.features, spec.strides, spec.drop_rate
    self.drops = spec.drop_rate > 0
    self.alpha, self.beta = config.alpha, 1 / spec.expected_std
    width = int(features * config.bottleneck)
    self.activation, conv = parts(config.dialect, config.activation)
    timm = config.dialect == "timm"
    self.conv0 = conv(in_features, width, 1, rngs=rngs)
    self.conv1 = conv(width, width, 3, strides=strides, rngs=rngs)
    self.conv2 = conv(width, features, 1, gain_init=0.0 if timm else 1.0, rngs=rngs)
    transition = strides > 1 or in_features != features
    self.pools = timm and strides > 1
    self.conv_shortcut = conv(in_features, features, 1, strides=1 if self.pools else strides, rngs=rngs) if transition else None
    self.gate = config.gate
    if config.gate == "se":
      hidden = gate_channels(config.dialect, features * config.se_ratio)
      self.se = layers.SqueezeExcite(features, hidden, dtype=dtype, rngs=rngs)
    elif config.gate == "eca":
      self.eca = layers.EfficientChannelAttention(features, rngs=rngs)
    self.skip_gain = None if timm else nnx.Param(layers.full(0)(None, ()))

  def __call__(self, x: Array, key: Array | None, train: bool, tap: Tap = no_tap) -> Array:
    out = self.activation(x) * jnp.asarray(self.beta, x.dtype)
    shortcut = x
    if self.conv_shortcut is not None:
      shortcut = self.conv_shortcut(layers.average_pool(out) if self.pools else out)
      tap("conv_shortcut", shortcut)
    for name in ("conv0", "conv1", "conv2"):
      out = getattr(self, name)(out if name == "conv0" else self.activation(out))
      tap(name, out)
    gate = None if self.gate is None else getattr(self, self.gate)(out) * 2
    tap("residual", out if gate is None else out * gate)
    drop_rate = self.drop_rate if train and self.drops else None
    return layers.join(shortcut, out, alpha=self.alpha, gain=self.skip_gain, gate=gate, drop_rate=drop_rate, key=key)


class NFResNet(Network):
  """A normalizer-free pre-activation ResNet."""

  def __init__(self, config: NFResNetConfig, num_classes: int, *, dtype, rngs: layers.ParamKeys):
    self.activation, conv = parts(config.dialect, config.activation)
    self.pool = config.stem_pool
    features = config.width[0] // 4
    self.stem = conv(3, features, config.stem_kernel, strides=config.stem_strides, rngs=rngs)
    specs = block_specs(
      depth=config.depth,
      width=config.width,
      strides=config.stage_strides,
      in_features=features,
      alpha=config.alpha,
      stochastic_depth=config.stochastic_depth,
    )
    blocks = [NFResBlock(config, spec, dtype=dtype, rngs=rngs) for spec in specs]
    super().__init__(
      blocks=blocks,
      features=config.width[-1],
      num_classes=num_classes,
      drop_rate=config.drop_rate,
      fc_stddev=0.01,
      remat=config.remat,
      scan=config.scan,
      dtype=dtype,
      rngs=rngs,
    )

  def run_stem(self, x: Array, train: bool, tap: Tap) -> Array:
    x = self.stem(x)
    tap("stem/conv", x)
    return layers.max_pool(x, self.stem.padding) if self.pool else x

  def run_tail(self, x: Array, key: Array | None, train: bool, tap: Tap) -> Array:
    return self.activation(x)


# ---- variants
DEPTHS = {
  26: (2, 2, 2, 2),
  50: (3, 4, 6, 3),
  101: (3, 4, 23, 3),
  152: (3, 8, 36, 3),
  200: (3, 24, 36, 3),
  288: (24, 24, 24, 24),
  600: (50, 50, 50, 50),
}
_se = functools.partial(NFResNetConfig, gate="se", se_ratio=1 / 16)  # as timm has it; the release has se_ratio=0.25
_eca = functools.partial(NFResNetConfig, gate="eca")

VARIANTS = {
  **{f"nf_resnet{num_layers}": NFResNetConfig(depth=depth) for num_layers, depth in DEPTHS.items()},
  **{f"nf_seresnet{num_layers}": _se(depth=DEPTHS[num_layers]) for num_layers in (26, 50, 101)},
  **{f"nf_ecaresnet{num_layers}": _eca(depth=DEPTHS[num_layers]) for num_layers in (26, 50, 101)},
  # the same blocks, narrow, for images of 32 pixels and CPUs; a 3×3 stem halves once
  "nf_resnet_tiny": NFResNetConfig(
    depth=(2, 2, 2),
    width=(64, 128, 256),
    stage_strides=(1, 2, 2),
    stem_kernel=3,
    stem_pool=False,
    stochastic_depth=0.0,
    train_resolution=32,
    test_resolution=32,
  ),
}
