"""NF-RegNet-B0…B8 (P1, 2101.08692, section 5.3 and appendix): RegNets scaled like EfficientNets, without normalization."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from nfnets.models import layers
from nfnets.models.dialect import Dialect, channels, gate_channels, parts
from nfnets.models.network import BlockSpec, Network, Tap, block_specs, no_tap

Array = jax.Array


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NFRegNetConfig:
  """A row of the variants' table."""

  # blocks of each stage
  depth: tuple[int, ...]
  # output channels of each stage before `width_multiplier`
  width: tuple[int, ...]
  # pixels a side
  train_resolution: int
  test_resolution: int
  # rate of the dropout before the classifier
  drop_rate: float
  # the factor by which the released models are narrower than `width`
  width_multiplier: float = 0.75
  # bottleneck channels / input channels, but 1 in the network's first block, as in EfficientNets
  expansion: float = 2.25
  # channels of a group in the 3×3 convolution
  group_width: int = 8
  # hidden features of squeeze-and-excite / bottleneck channels
  se_ratio: float = 0.5
  activation: str = "silu"
  # residual branches are scaled by alpha: variance grows by alpha² a block
  alpha: float = 0.2
  stage_strides: tuple[int, ...] = (2, 2, 2, 2)
  # probability to drop a residual branch, which grows linearly from 0 at the first block to about this at the last
  stochastic_depth: float = 0.1
  # whose conventions, see dialect.py
  dialect: Dialect = "official"
  # compute each block's activations again in the backward pass instead of keeping them
  remat: bool = False
  # trace blocks of a stage that are equal once, and run them in a loop (jax.lax.scan)
  scan: bool = False


class NFRegBlock(nnx.Module):
  """An inverted bottleneck 1×1 → grouped 3×3 → gate (×2) → 1×1; a transition's shortcut averages 2×2 pixels, then 1×1."""

  def __init__(self, config: NFRegNetConfig, spec: BlockSpec, *, dtype, rngs: layers.ParamKeys):
    in_features, features, self.strides, self.drop_rate = spec.in_features, spec.features, spec.strides, spec.drop_rate
    self.drops = spec.drop_rate > 0
    self.alpha, self.beta = config.alpha, 1 / spec.expected_std
    expansion = config.expansion if spec.index else 1.0
    groups = channels(config.dialect, in_features * expansion) // config.group_width
    width = groups * config.group_width
    self.activation, conv = parts(config.dialect, config.activation)
    timm = config.dialect == "timm"
    self.conv0 = conv(in_features, width, 1, rngs=rngs)
    self.conv1 = conv(width, width, 3, strides=self.strides, groups=groups, rngs=rngs)
    self.se = layers.SqueezeExcite(width, gate_channels(config.dialect, width * config.se_ratio), dtype=dtype, rngs=rngs)
    self.conv2 = conv(width, features, 1, gain_init=0.0 if timm else 1.0, rngs=rngs)
    transition = self.strides > 1 or in_features != features
    self.conv_shortcut = conv(in_features, features, 1, rngs=rngs) if transition else None
    self.skip_gain = None if timm else nnx.Param(layers.full(0)(None, ()))

  def __call__(self, x: Array, key: Array | None, train: bool, tap: Tap = no_tap) -> Array:
    out = self.activation(x) * jnp.asarray(self.beta, x.dtype)
    shortcut = x
    if self.conv_shortcut is not None:
      shortcut = self.conv_shortcut(layers.average_pool(out) if self.strides > 1 else out)
      tap("conv_shortcut", shortcut)
    out = self.conv0(out)
    tap("conv0", out)
    out = self.conv1(self.activation(out))
    tap("conv1", out)
    out = self.se(out) * 2 * out
    out = self.conv2(self.activation(out))
    tap("conv2", out)
    tap("residual", out)
    drop_rate = self.drop_rate if train and self.drops else None
    return layers.join(shortcut, out, alpha=self.alpha, gain=self.skip_gain, drop_rate=drop_rate, key=key)


class NFRegNet(Network):
  """A normalizer-free RegNet; its classifier starts from zero."""

  def __init__(self, config: NFRegNetConfig, num_classes: int, *, dtype, rngs: layers.ParamKeys):
    self.activation, conv = parts(config.dialect, config.activation)
    widths = [channels(config.dialect, width * config.width_multiplier) for width in config.width]
    self.stem = conv(3, widths[0], 3, strides=2, rngs=rngs)
    specs = block_specs(
      depth=config.depth,
      width=widths,
      strides=config.stage_strides,
      in_features=widths[0],
      alpha=config.alpha,
      stochastic_depth=config.stochastic_depth,
    )
    blocks = [NFRegBlock(config, spec, dtype=dtype, rngs=rngs) for spec in specs]
    final = 1280 * widths[-1] // 440
    if config.dialect == "timm":
      final = channels("timm", 1280 * config.width[-1] // 440 * config.width_multiplier)
    self.final_conv = conv(widths[-1], final, 1, rngs=rngs)
    super().__init__(
      blocks=blocks,
      features=final,
      num_classes=num_classes,
      drop_rate=config.drop_rate,
      fc_stddev=0.01 if config.dialect == "timm" else 0.0,
      remat=config.remat,
      scan=config.scan,
      dtype=dtype,
      rngs=rngs,
    )

  def run_stem(self, x: Array, train: bool, tap: Tap) -> Array:
    return self.stem(x)

  def run_tail(self, x: Array, key: Array | None, train: bool, tap: Tap) -> Array:
    x = self.final_conv(x)
    tap("final_conv", x)
    return self.activation(x)


# ---- variants
_R = NFRegNetConfig
VARIANTS = {
  f"nf_regnet_{name}": row
  for name, row in {
    "b0": _R(width=(48, 104, 208, 440), depth=(1, 3, 6, 6), train_resolution=192, test_resolution=224, drop_rate=0.2),
    "b1": _R(width=(48, 104, 208, 440), depth=(2, 4, 7, 7), train_resolution=224, test_resolution=256, drop_rate=0.2),
    "b2": _R(width=(56, 112, 232, 488), depth=(2, 4, 8, 8), train_resolution=240, test_resolution=272, drop_rate=0.3),
    "b3": _R(width=(56, 128, 248, 528), depth=(2, 5, 9, 9), train_resolution=288, test_resolution=320, drop_rate=0.3),
    "b4": _R(width=(64, 144, 288, 616), depth=(2, 6, 11, 11), train_resolution=320, test_resolution=384, drop_rate=0.4),
    "b5": _R(width=(80, 168, 336, 704), depth=(3, 7, 14, 14), train_resolution=384, test_resolution=456, drop_rate=0.4),
    "b6": _R(width=(88, 184, 376, 792), depth=(3, 8, 16, 16), train_resolution=448, test_resolution=528, drop_rate=0.5),
    "b7": _R(width=(96, 208, 416, 880), depth=(4, 10, 19, 19), train_resolution=512, test_resolution=600, drop_rate=0.5),
    "b8": _R(width=(104, 232, 456, 968), depth=(4, 11, 22, 22), train_resolution=600, test_resolution=672, drop_rate=0.5),
  }.items()
}
