"""NFNet-F0…F7 and F0+…F7+ (P2, 2102.06171, section 4 and appendix C), and timm's nfnet_l0 and ECA-NFNet-L0…L3."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from nfnets.models import layers
from nfnets.models.dialect import Dialect, channels, gate_channels, parts
from nfnets.models.network import BlockSpec, Network, Tap, block_specs, no_tap

Array = jax.Array


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NFNetConfig:
  """A row of the variants' table."""

  # blocks of each stage
  depth: tuple[int, ...]
  # pixels a side
  train_resolution: int
  test_resolution: int
  # output channels of each stage
  width: tuple[int, ...] = (256, 512, 1536, 1536)
  # bottleneck channels / output channels
  expansion: float = 0.5
  # channels of a group in the 3×3 convolutions
  group_width: int = 128
  # how the number of groups, bottleneck / group_width, is rounded: "floor" as in the release (one group of 128 in stage 1 of
  # F0+), "nearest" as the paper's parameter counts of the F+ models want (two groups of 128)
  group_rounding: Literal["floor", "nearest"] = "floor"
  # channels of the stem's first three convolutions; its fourth has `stem_features`, or half of stage 1's width
  stem_width: tuple[int, int, int] = (16, 32, 64)
  stem_features: int | None = None
  stem_strides: tuple[int, int, int, int] = (2, 1, 1, 2)
  stage_strides: tuple[int, ...] = (1, 2, 2, 2)
  # gate at the end of a residual branch: squeeze-and-excite or efficient channel attention; se_ratio = its hidden / its channels
  gate: Literal["se", "eca"] = "se"
  se_ratio: float = 0.5
  activation: str = "gelu"
  # residual branches are scaled by alpha: variance grows by alpha² a block
  alpha: float = 0.2
  # channels of the last 1×1 convolution / last width
  final_conv_mult: float = 2.0
  # probability to drop a residual branch, which grows linearly from 0 at the first block to about this at the last
  stochastic_depth: float = 0.25
  # rate of the dropout before the classifier
  drop_rate: float = 0.2
  # RandAugment (layers, magnitude) of the published recipe
  randaugment: tuple[int, int] = (4, 5)
  # whose conventions, see dialect.py
  dialect: Dialect = "official"
  # compute each block's activations again in the backward pass instead of keeping them
  remat: bool = False
  # trace blocks of a stage that are equal once, and run them in a loop (jax.lax.scan)
  scan: bool = False


class NFBlock(nnx.Module):
  """A bottleneck 1×1 → grouped 3×3 → grouped 3×3 → 1×1 with a gate (×2), skip gain and alpha (P2, figure 5).

  It reads and writes [B, H, W, C]; `beta` = 1/expected_std brings what it reads to unit variance.
  """

  def __init__(self, config: NFNetConfig, spec: BlockSpec, *, dtype, rngs: layers.ParamKeys):
    in_features, features, self.strides, self.drop_rate = spec.in_features, spec.features, spec.strides, spec.drop_rate
    self.drops = spec.drop_rate > 0
    self.alpha, self.beta = config.alpha, 1 / spec.expected_std
    bottleneck = channels(config.dialect, features * config.expansion)
    groups = bottleneck / config.group_width
    groups = max(1, round(groups) if config.group_rounding == "nearest" else int(groups))
    width = groups * config.group_width
    self.activation, conv = parts(config.dialect, config.activation)
    self.conv0 = conv(in_features, width, 1, rngs=rngs)
    self.conv1 = conv(width, width, 3, strides=self.strides, groups=groups, rngs=rngs)
    self.conv1b = conv(width, width, 3, groups=groups, rngs=rngs)
    timm = config.dialect == "timm"
    self.conv2 = conv(width, features, 1, gain_init=0.0 if timm else 1.0, rngs=rngs)
    transition = self.strides > 1 or in_features != features
    self.conv_shortcut = conv(in_features, features, 1, rngs=rngs) if transition else None
    if config.gate == "se":
      self.se = layers.SqueezeExcite(features, gate_channels(config.dialect, features * config.se_ratio), dtype=dtype, rngs=rngs)
    else:
      self.eca = layers.EfficientChannelAttention(features, rngs=rngs)
    self.gate = config.gate
    self.skip_gain = None if timm else nnx.Param(layers.full(0)(None, ()))

  def __call__(self, x: Array, key: Array | None, train: bool, tap: Tap = no_tap) -> Array:
    out = self.activation(x) * jnp.asarray(self.beta, x.dtype)
    shortcut = x
    if self.conv_shortcut is not None:
      shortcut = self.conv_shortcut(layers.average_pool(out) if self.strides > 1 else out)
      tap("conv_shortcut", shortcut)
    for name in ("conv0", "conv1", "conv1b", "conv2"):
      out = getattr(self, name)(out if name == "conv0" else self.activation(out))
      tap(name, out)
    gate = getattr(self, self.gate)(out) * 2  # since a sigmoid's mean is about 1/2 (P2, section 4)
    tap("residual", out * gate)
    drop_rate = self.drop_rate if train and self.drops else None
    return layers.join(shortcut, out, alpha=self.alpha, gain=self.skip_gain, gate=gate, drop_rate=drop_rate, key=key)


class NFNet(Network):
  """A normalizer-free network of the F series or of timm's L series."""

  def __init__(self, config: NFNetConfig, num_classes: int, *, dtype, rngs: layers.ParamKeys):
    self.activation, conv = parts(config.dialect, config.activation)
    stem = (3, *config.stem_width, config.stem_features or config.width[0] // 2)
    self.stem = nnx.Dict(
      {f"conv{i}": conv(stem[i], stem[i + 1], 3, strides=strides, rngs=rngs) for i, strides in enumerate(config.stem_strides)}
    )
    specs = block_specs(
      depth=config.depth,
      width=config.width,
      strides=config.stage_strides,
      in_features=stem[-1],
      alpha=config.alpha,
      stochastic_depth=config.stochastic_depth,
    )
    blocks = [NFBlock(config, spec, dtype=dtype, rngs=rngs) for spec in specs]
    features = config.width[-1]
    final = channels(config.dialect, features * config.final_conv_mult)
    self.final_conv = conv(features, final, 1, rngs=rngs)
    super().__init__(
      blocks=blocks,
      features=final,
      num_classes=num_classes,
      drop_rate=config.drop_rate,
      fc_stddev=0.01,
      remat=config.remat,
      scan=config.scan,
      dtype=dtype,
      rngs=rngs,
    )

  def run_stem(self, x: Array, train: bool, tap: Tap) -> Array:
    for i, name in enumerate(self.stem):
      x = self.stem[name](self.activation(x) if i else x)  # none after the last, since the first block begins with an activation
      tap(f"stem/{name}", x)
    return x

  def run_tail(self, x: Array, key: Array | None, train: bool, tap: Tap) -> Array:
    x = self.final_conv(x)
    tap("final_conv", x)
    return self.activation(x)


# ---- variants
_F = NFNetConfig
_F_SERIES = {
  "f0": _F(depth=(1, 2, 6, 3), train_resolution=192, test_resolution=256, drop_rate=0.2, randaugment=(4, 5)),
  "f1": _F(depth=(2, 4, 12, 6), train_resolution=224, test_resolution=320, drop_rate=0.3, randaugment=(4, 10)),
  "f2": _F(depth=(3, 6, 18, 9), train_resolution=256, test_resolution=352, drop_rate=0.4, randaugment=(4, 10)),
  "f3": _F(depth=(4, 8, 24, 12), train_resolution=320, test_resolution=416, drop_rate=0.4, randaugment=(4, 15)),
  "f4": _F(depth=(5, 10, 30, 15), train_resolution=384, test_resolution=512, drop_rate=0.5, randaugment=(4, 15)),
  "f5": _F(depth=(6, 12, 36, 18), train_resolution=416, test_resolution=544, drop_rate=0.5, randaugment=(4, 15)),
  "f6": _F(depth=(7, 14, 42, 21), train_resolution=448, test_resolution=576, drop_rate=0.5, randaugment=(4, 15)),
  "f7": _F(depth=(8, 16, 48, 24), train_resolution=480, test_resolution=608, drop_rate=0.5, randaugment=(4, 15)),
}
_light = functools.partial(
  NFNetConfig,
  expansion=0.25,
  group_width=64,
  activation="silu",
  dialect="timm",
  gate="eca",
  stem_features=128,
  drop_rate=0.0,
  stochastic_depth=0.0,
)

VARIANTS = {
  **{f"nfnet_{name}": row for name, row in _F_SERIES.items()},
  **{f"nfnet_{name}+": dataclasses.replace(row, width=(384, 768, 2048, 2048)) for name, row in _F_SERIES.items()},
  "nfnet_l0": _light(
    depth=(1, 2, 6, 3), train_resolution=224, test_resolution=288, final_conv_mult=1.5, gate="se", se_ratio=0.25
  ),
  "eca_nfnet_l0": _light(depth=(1, 2, 6, 3), train_resolution=224, test_resolution=288, final_conv_mult=1.5),
  "eca_nfnet_l1": _light(depth=(2, 4, 12, 6), train_resolution=256, test_resolution=320),
  "eca_nfnet_l2": _light(depth=(3, 6, 18, 9), train_resolution=320, test_resolution=384),
  "eca_nfnet_l3": _light(depth=(4, 8, 24, 12), train_resolution=352, test_resolution=448),
  # timm's smallest, for tests
  "test_nfnet": _light(
    depth=(1, 1, 1, 1),
    width=(32, 64, 96, 128),
    group_width=8,
    train_resolution=160,
    test_resolution=160,
    final_conv_mult=1.5,
    gate="se",
    se_ratio=0.25,
  ),
  # the same blocks, narrow, for images of 8 pixels, which are halved twice in all
  "nfnet_digits": _F(
    depth=(1, 1, 1, 1),
    width=(32, 64, 128, 128),
    group_width=16,
    stem_width=(8, 12, 16),
    stem_strides=(1, 1, 1, 1),
    stage_strides=(1, 2, 2, 1),
    train_resolution=8,
    test_resolution=8,
    drop_rate=0.1,
    stochastic_depth=0.0,
    randaugment=(2, 5),
  ),
  # the same blocks, narrow, for images of 32 pixels and CPUs; the stem halves once
  "nfnet_tiny": _F(
    depth=(1, 1, 2, 1),
    width=(32, 64, 128, 128),
    group_width=16,
    stem_width=(8, 12, 16),
    stem_strides=(1, 1, 1, 2),
    train_resolution=32,
    test_resolution=32,
    drop_rate=0.1,
    stochastic_depth=0.1,
    randaugment=(2, 5),
  ),
}
