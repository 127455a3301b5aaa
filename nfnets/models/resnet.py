"""The papers' baselines, all of them ResNets: with any normalizer of norms.py, or what stands in its place.

P1 and P2 (see layers.py) compare with pre-activation bottleneck ResNets (He et al., 1603.05027). Depths are those of the release.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import nnx

from nfnets.errors import UserError
from nfnets.models import activations, layers
from nfnets.models.network import BlockSpec, Network, Tap, block_specs, no_tap
from nfnets.models.nf_resnet import DEPTHS, NFResNet, NFResNetConfig
from nfnets.models.norms import ON_ACTIVATIONS, activation_of, conv_of, make_norm, normalize, parse

Array = jax.Array


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResNetConfig:
  """A row of the variants' table."""

  # blocks of each stage
  depth: tuple[int, ...]
  # a name of norms.NUMBERS, such as "batch", "group:8", "dyt", "scaled_weight_std", "skipinit", "fixup", "nf" or "none"
  norm: str = "batch"
  # output channels of each stage; the stem has a quarter of the first
  width: tuple[int, ...] = (256, 512, 1024, 2048)
  # bottleneck channels / output channels
  bottleneck: float = 0.25
  # the stem: a convolution of this size, and whether a 3×3 max pool follows it
  stem_kernel: int = 7
  stem_strides: int = 2
  stem_pool: bool = True
  stage_strides: tuple[int, ...] = (1, 2, 2, 2)
  # without its gamma, on which these networks do not rely
  activation: str = "relu"
  # probability to drop a residual branch, which grows linearly from 0 at the first block to about this at the last
  stochastic_depth: float = 0.0
  # rate of the dropout before the classifier
  drop_rate: float = 0.0
  # pixels a side
  train_resolution: int = 224
  test_resolution: int = 224
  # compute each block's activations again in the backward pass instead of keeping them
  remat: bool = False
  # trace blocks of a stage that are equal once, and run them in a loop (jax.lax.scan)
  scan: bool = False


class ResBlock(nnx.Module):
  """A pre-activation bottleneck, three times norm → activation → conv; the shortcut's projection reads the first activation."""

  def __init__(self, config: ResNetConfig, spec: BlockSpec, *, dtype, rngs: layers.ParamKeys):
    in_features, features, strides, self.drop_rate = spec.in_features, spec.features, spec.strides, spec.drop_rate
    self.drops = spec.drop_rate > 0
    width = int(features * config.bottleneck)
    self.draws = config.norm == "noisy_batch"  # noise, at each call in training
    bias = parse(config.norm)[0] not in ON_ACTIVATIONS
    conv = conv_of(config.norm)
    self.activation = activation_of(config.norm, config.activation)
    self.norm0 = make_norm(config.norm, in_features, dtype=dtype, rngs=rngs)
    self.conv0 = conv(in_features, width, 1, use_bias=bias, rngs=rngs)
    self.norm1 = make_norm(config.norm, width, dtype=dtype, rngs=rngs)
    self.conv1 = conv(width, width, 3, strides=strides, use_bias=bias, rngs=rngs)
    self.norm2 = make_norm(config.norm, width, dtype=dtype, rngs=rngs)
    self.conv2 = conv(width, features, 1, use_bias=bias, rngs=rngs)
    transition = strides > 1 or in_features != features
    self.conv_shortcut = conv(in_features, features, 1, strides=strides, use_bias=bias, rngs=rngs) if transition else None
    gain = {"skipinit": 0.0, "skipinit_root": sum(config.depth) ** -0.5}.get(config.norm)
    self.skip_gain = None if gain is None else nnx.Param(layers.full(gain)(None, ()))

  def __call__(self, x: Array, key: Array | None, train: bool, tap: Tap = no_tap) -> Array:
    keys = [layers.fold_in(key, i) for i in range(3)] if train and self.draws and key is not None else [None] * 3
    out = self.activation(normalize(self.norm0, x, train, keys[0]))
    shortcut = x
    if self.conv_shortcut is not None:
      shortcut = self.conv_shortcut(out)
      tap("conv_shortcut", shortcut)
    out = self.conv0(out)
    tap("conv0", out)
    out = self.conv1(self.activation(normalize(self.norm1, out, train, keys[1])))
    tap("conv1", out)
    out = self.conv2(self.activation(normalize(self.norm2, out, train, keys[2])))
    tap("conv2", out)
    tap("residual", out)
    drop_rate = self.drop_rate if train and self.drops else None
    return layers.join(shortcut, out, gain=self.skip_gain, drop_rate=drop_rate, key=key)


class FixupBlock(nnx.Module):
  """A post-activation bottleneck with a scalar bias before and after every convolution and a scale at the end.

  The kernels of the branch's first two convolutions are scaled by (number of blocks)^(-1/4), the last starts from zero
  (1901.09321, section 3).
  """

  def __init__(self, config: ResNetConfig, spec: BlockSpec, *, dtype, rngs: layers.ParamKeys):
    in_features, features, strides, self.drop_rate = spec.in_features, spec.features, spec.strides, spec.drop_rate
    self.drops = spec.drop_rate > 0
    width = int(features * config.bottleneck)
    depth_scale = sum(config.depth) ** -0.25
    init = layers.normal
    self.activation = activations.ACTIVATIONS[config.activation].without_gamma()
    self.conv0 = layers.Conv(in_features, width, 1, use_bias=False, kernel_init=init((2 / width) ** 0.5 * depth_scale), rngs=rngs)
    self.conv1 = layers.Conv(
      width, width, 3, strides=strides, use_bias=False, kernel_init=init((2 / (width * 9)) ** 0.5 * depth_scale), rngs=rngs
    )
    self.conv2 = layers.Conv(width, features, 1, use_bias=False, kernel_init=layers.full(0), rngs=rngs)
    transition = strides > 1 or in_features != features
    self.conv_shortcut = (
      layers.Conv(in_features, features, 1, strides=strides, use_bias=False, kernel_init=init((2 / features) ** 0.5), rngs=rngs)
      if transition
      else None
    )
    zero = lambda: nnx.Param(layers.full(0)(None, ()))
    self.bias1a, self.bias1b, self.bias2a, self.bias2b, self.bias3a, self.bias3b = (zero() for _ in range(6))
    self.scale = nnx.Param(layers.full(1)(None, ()))

  def __call__(self, x: Array, key: Array | None, train: bool, tap: Tap = no_tap) -> Array:
    scalar = lambda param: param[...].astype(x.dtype)
    out = shortcut = x + scalar(self.bias1a)
    if self.conv_shortcut is not None:
      shortcut = self.conv_shortcut(out)
      tap("conv_shortcut", shortcut)
    out = self.conv0(out)
    tap("conv0", out)
    out = self.conv1(self.activation(out + scalar(self.bias1b)) + scalar(self.bias2a))
    tap("conv1", out)
    out = self.conv2(self.activation(out + scalar(self.bias2b)) + scalar(self.bias3a))
    tap("conv2", out)
    out = out * scalar(self.scale) + scalar(self.bias3b)
    tap("residual", out)
    drop_rate = self.drop_rate if train and self.drops else None
    return self.activation(layers.join(shortcut, out, drop_rate=drop_rate, key=key))


class ResNet(Network):
  """A pre-activation ResNet with `config.norm`; its classifier starts from zero."""

  block: ClassVar[Callable[..., nnx.Module]] = ResBlock

  def __init__(self, config: ResNetConfig, num_classes: int, *, dtype, rngs: layers.ParamKeys):
    self.activation = activation_of(config.norm, config.activation)
    self.pool, self.draws = config.stem_pool, config.norm == "noisy_batch"
    features = config.width[0] // 4
    self.stem = conv_of(config.norm)(3, features, config.stem_kernel, strides=config.stem_strides, use_bias=False, rngs=rngs)
    specs = block_specs(
      depth=config.depth,
      width=config.width,
      strides=config.stage_strides,
      in_features=features,
      alpha=1.0,
      stochastic_depth=config.stochastic_depth,
    )
    blocks = [self.block(config, spec, dtype=dtype, rngs=rngs) for spec in specs]
    self.final_norm = make_norm(config.norm, config.width[-1], dtype=dtype, rngs=rngs)
    super().__init__(
      blocks=blocks,
      features=config.width[-1],
      num_classes=num_classes,
      drop_rate=config.drop_rate,
      fc_stddev=0.0,
      remat=config.remat,
      scan=config.scan,
      dtype=dtype,
      rngs=rngs,
    )

  def run_stem(self, x: Array, train: bool, tap: Tap) -> Array:
    x = self.stem(x)
    tap("stem/conv", x)
    return layers.max_pool(x) if self.pool else x

  def run_tail(self, x: Array, key: Array | None, train: bool, tap: Tap) -> Array:
    noise_key = layers.fold_in(key, len(self.blocks) + 1) if self.draws and key is not None else None
    return self.activation(normalize(self.final_norm, x, train, noise_key))


class FixupResNet(ResNet):
  """A post-activation ResNet with Fixup's initialisation and its scalar biases `bias1` (stem) and `bias2` (classifier)."""

  block: ClassVar[Callable[..., nnx.Module]] = FixupBlock

  def __init__(self, config: ResNetConfig, num_classes: int, *, dtype, rngs: layers.ParamKeys):
    super().__init__(config, num_classes, dtype=dtype, rngs=rngs)
    self.bias1, self.bias2 = nnx.Param(layers.full(0)(None, ())), nnx.Param(layers.full(0)(None, ()))

  def run_stem(self, x: Array, train: bool, tap: Tap) -> Array:
    x = self.activation(self.stem(x) + self.bias1[...].astype(x.dtype))
    tap("stem/conv", x)
    return layers.max_pool(x) if self.pool else x

  def run_tail(self, x: Array, key: Array | None, train: bool, tap: Tap) -> Array:
    return x

  def classify(self, pool: Array) -> Array:
    return self.fc(pool + self.bias2[...])


def with_norm(config: NFResNetConfig) -> ResNetConfig:
  """The row of a normalizer-free ResNet as one whose `norm` can be chosen, "nf" so far.

  Raises:
    UserError: it has a gate, which these networks do not have.
  """
  if config.gate is not None:
    raise UserError(f"norm: a network with gate={config.gate!r} takes none; expected one without a gate, such as nf_resnet50")
  return ResNetConfig(norm="nf", **_shared(config))


def _shared(config: ResNetConfig | NFResNetConfig) -> dict[str, Any]:
  """The fields that both kinds of rows have."""
  names = [{field.name for field in dataclasses.fields(kind)} for kind in (ResNetConfig, NFResNetConfig)]
  return {name: getattr(config, name) for name in names[0] & names[1]}


def of_norm(config: ResNetConfig) -> tuple[Callable[..., Network], ResNetConfig | NFResNetConfig]:
  """The network that a row's `norm` asks for, and its row; with "nf" that is an NF-ResNet with the fields that both have."""
  if config.norm != "nf":
    return FixupResNet if config.norm == "fixup" else ResNet, config
  return NFResNet, NFResNetConfig(**_shared(config))


# ---- variants
_tiny: dict[str, Any] = {
  "depth": (2, 2, 2),
  "width": (64, 128, 256),
  "stage_strides": (1, 2, 2),
  "stem_kernel": 3,
  "stem_pool": False,
  "train_resolution": 32,
  "test_resolution": 32,
}
_resnets: dict[str, Callable[..., ResNetConfig]] = {
  "resnet": ResNetConfig,
  "skipinit_resnet": functools.partial(ResNetConfig, norm="skipinit"),
  "fixup_resnet": functools.partial(ResNetConfig, norm="fixup"),
}

VARIANTS = {
  f"{name}{num_layers}": row(depth=depth, stochastic_depth=0.0 if name == "resnet" else 0.1)
  for name, row in _resnets.items()
  for num_layers, depth in DEPTHS.items()
}
VARIANTS |= {f"{name}_tiny": row(**_tiny) for name, row in _resnets.items()}  # the shape of nf_resnet_tiny
