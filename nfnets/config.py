"""The typed configuration: plain dataclasses that a file of `configs/` fills in and the command line overrides.

`slots=True` turns a mistyped field into an error at construction and at assignment. Fields are checked when the object
is made and again, by `validate`, when it is read: an override on the command line assigns without constructing.
"""

import dataclasses
import difflib
import math
import re
from typing import Any

OPTIMIZERS = ("sgd", "adamw", "lars")
SCHEDULES = ("cosine", "constant")

# Fields that only some optimizers read; setting one for another optimizer would have no effect, so it is an error.
_READ_BY = {
  "momentum": ("sgd", "lars"),
  "nesterov": ("sgd", "lars"),
  "b1": ("adamw",),
  "b2": ("adamw",),
  "eps": ("adamw",),
  "trust_coefficient": ("lars",),
}


@dataclasses.dataclass(slots=True, kw_only=True)
class OptimConfig:
  """Optimizer, learning-rate schedule, adaptive gradient clipping (AGC) and parameter averaging.

  The defaults are the recipe of NFNet-F0 (Brock et al. 2021, "High-Performance Large-Scale Image Recognition Without
  Normalization", section 4 and appendix A). Values that follow from others (peak learning rate, warm-up steps) are
  computed in `nfnets.optim`, never stored.

  Raises:
    ValueError: a field has a wrong type or range, names an unknown choice, or is not read by the chosen optimizer.
  """

  # Optimizer: "sgd", "adamw" or "lars". Plain SGD is "sgd" with momentum 0.
  name: str = "sgd"

  # Peak learning rate per 256 images (the peak itself when scale_lr is False).
  base_lr: float = 0.1
  # Whether the peak is base_lr · batch / 256 (linear scaling with the global batch) or base_lr as it stands.
  scale_lr: bool = True
  # Learning rate at the last step of the cosine; a final value, not scaled by the batch.
  end_lr: float = 0.0
  # Course after the warm-up: "cosine" (falls to end_lr) or "constant" (stays at the peak).
  schedule: str = "cosine"
  # Length of the linear warm-up from 0, in epochs (fractions allowed; 0 = none).
  warmup_epochs: float = 5.0

  # Momentum coefficient of SGD and LARS, in [0, 1); 0 keeps no momentum buffer.
  momentum: float = 0.9
  # Nesterov momentum for SGD and LARS; None = as published: True for SGD, False for LARS.
  nesterov: bool | None = None
  # Weight decay per step, on kernels only: added to the gradient (SGD, LARS) or times the learning rate (AdamW).
  weight_decay: float = 2e-5
  # AdamW: decay of the first moment, in [0, 1).
  b1: float = 0.9
  # AdamW: decay of the second moment, in [0, 1).
  b2: float = 0.999
  # AdamW: added to the root of the second moment.
  eps: float = 1e-8
  # LARS: local learning rate as a fraction of ‖w‖/‖update‖.
  trust_coefficient: float = 0.001

  # AGC's lambda, the largest ‖gradient‖/‖weight‖ of a unit; None or inf = off (a command line can say inf, not None).
  clipping: float | None = 0.01
  # AGC: floor of ‖weight‖, so that parameters initialised to zero can move.
  agc_eps: float = 1e-3
  # AGC: path patterns (regular expressions) to leave unclipped, beside those the model itself marks (its classifier).
  agc_exclude: tuple[str, ...] = ()
  # AGC: keep clip fractions and largest ratios in the optimizer's state for the logs.
  agc_track: bool = False

  # Decay of the parameters' moving average per step, in [0, 1), warmed up as (1 + t)/(10 + t); None = no average.
  ema_decay: float | None = 0.99999

  def __post_init__(self) -> None:
    self.validate()

  def validate(self) -> None:
    """Checks every field; raises ValueError naming the field, the value got and what was expected."""
    _check_choice("name", self.name, OPTIMIZERS)
    _check_choice("schedule", self.schedule, SCHEDULES)
    for field in ("base_lr", "eps", "agc_eps", "trust_coefficient"):
      _check_number(field, getattr(self, field), "a finite number > 0", lambda x: 0 < x < math.inf)
    for field in ("end_lr", "warmup_epochs", "weight_decay"):
      _check_number(field, getattr(self, field), "a finite number >= 0", lambda x: 0 <= x < math.inf)
    for field in ("momentum", "b1", "b2"):
      _check_number(field, getattr(self, field), "a number in [0, 1)", lambda x: 0 <= x < 1)
    if self.clipping is not None:
      _check_number("clipping", self.clipping, "a number > 0, or None (or inf) for no clipping", lambda x: x > 0)
    if self.ema_decay is not None:
      _check_number("ema_decay", self.ema_decay, "a number in [0, 1), or None for no average", lambda x: 0 <= x < 1)
    for field in ("scale_lr", "agc_track"):
      if not isinstance(getattr(self, field), bool):
        raise _invalid(field, getattr(self, field), "True or False")
    if self.nesterov is not None and not isinstance(self.nesterov, bool):
      raise _invalid("nesterov", self.nesterov, "True, False or None")
    _check_patterns("agc_exclude", self.agc_exclude)

    for field in dataclasses.fields(self):
      readers = _READ_BY.get(field.name, OPTIMIZERS)
      value = getattr(self, field.name)
      if self.name not in readers and value != field.default:
        raise ValueError(
          f"OptimConfig.{field.name} = {value!r} has no effect: only {' and '.join(readers)} read it, and name is "
          f"{self.name!r}. Leave it at its default {field.default!r} or change OptimConfig.name."
        )
    if self.schedule == "constant" and self.end_lr != 0:
      raise ValueError(
        f"OptimConfig.end_lr = {self.end_lr!r} has no effect with schedule 'constant'. Set it to 0 or choose 'cosine'."
      )
    if self.name == "sgd" and self.nesterov and self.momentum == 0:
      raise ValueError("OptimConfig.nesterov = True needs momentum > 0, got momentum 0. Raise it or unset nesterov.")


def _invalid(field: str, value: object, expected: str) -> ValueError:
  return ValueError(f"OptimConfig.{field} = {value!r}: expected {expected}.")


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
  if value in choices:
    return
  near = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.5)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  raise ValueError(f"OptimConfig.{field} = {value!r}: expected one of {', '.join(map(repr, choices))}.{hint}")


def _check_number(field: str, value: object, expected: str, accepts) -> None:
  # NaN fails every comparison, so it never passes `accepts`.
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not accepts(value):
    raise _invalid(field, value, expected)


def _check_patterns(field: str, value: object) -> None:
  if not isinstance(value, tuple) or not all(isinstance(pattern, str) for pattern in value):
    raise _invalid(field, value, "a tuple of regular expressions, such as ('^head/kernel$',)")
  for pattern in value:
    try:
      re.compile(pattern)
    except re.error as error:
      raise _invalid(field, pattern, f"a regular expression ({error})") from error


@dataclasses.dataclass(slots=True, kw_only=True)
class ModelConfig:
  """Which network; None leaves a field to the variant's row in `nfnets.models`."""

  # Name as in nfnets.models.names().
  name: str = "nfnet_f0"
  # What convolutions compute in: "float32" or "bfloat16"; parameters, statistics and logits are float32.
  dtype: str = "float32"
  # Dropout before the classifier, in [0, 1).
  drop_rate: float | None = None
  # Probability to drop the last block's residual branch, in [0, 1).
  stochastic_depth: float | None = None
  # Activation, one of nfnets.models.layers.ACTIVATIONS.
  activation: str | None = None
  # Recompute each block's activations in the backward pass: less memory, about a third more time.
  remat: bool = False
  # Any other field of the variant's row, e.g. {"stem_strides": (1, 1, 1, 1)}.
  overrides: dict[str, Any] = dataclasses.field(default_factory=dict)

  def all_overrides(self) -> dict[str, Any]:
    """What to hand to `models.create` beside the name."""
    named = {field: getattr(self, field) for field in ("drop_rate", "stochastic_depth", "activation")}
    return {**self.overrides, **{k: v for k, v in named.items() if v is not None}, **({"remat": True} if self.remat else {})}

  def validate(self) -> None:
    if self.dtype not in ("float32", "bfloat16"):
      raise ValueError(f"ModelConfig.dtype = {self.dtype!r}: expected 'float32' or 'bfloat16'.")


@dataclasses.dataclass(slots=True, kw_only=True)
class DataConfig:
  """Which images, and what is done to them before the network sees them."""

  # "digits" (scikit-learn's, in the wheel), "synthetic", or the name of a prepared TFDS dataset such as "cifar10".
  name: str = "digits"
  # Where TFDS datasets are prepared; empty = TFDS's own default, ~/tensorflow_datasets.
  dir: str = ""
  train_split: str = "train"
  test_split: str = "test"
  # Classes of the classifier; must be what the data has. None = as the data says.
  num_classes: int | None = None
  # Side of the square images, pixels. None = as stored; only synthetic images can have any size.
  image_size: int | None = None
  # Training images: random shift by up to this many pixels each way (edges repeat), and mirroring half of them.
  shift: int = 0
  flip: bool = False
  # Per channel, on the scale 0–255; subtracted and divided by on the device. ImageNet's.
  mean: tuple[float, ...] = (123.675, 116.28, 103.53)
  std: tuple[float, ...] = (58.395, 57.12, 57.375)

  def validate(self) -> None:
    for field, least in (("num_classes", 1), ("image_size", 1), ("shift", 0)):
      value = getattr(self, field)
      if value is None and least:
        continue
      if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"DataConfig.{field} = {value!r}: expected a whole number >= {least}.")
    for field in ("mean", "std"):
      value = getattr(self, field)
      if len(value) != 3 or not all(isinstance(v, (int, float)) for v in value) or field == "std" and min(value) <= 0:
        raise ValueError(f"DataConfig.{field} = {value!r}: expected three numbers{' > 0' if field == 'std' else ''}.")


@dataclasses.dataclass(slots=True, kw_only=True)
class Config:
  """A whole training run. Values that follow from others (steps, learning rate) are computed where they are used.

  Raises (from `validate`, which the programs call after the command line's overrides):
    ValueError: a field has a wrong value; the message names it.
  """

  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)

  # Images a training step, over all devices; and images an evaluation step (any number: the last batch is padded).
  batch: int = 256
  eval_batch: int = 256
  # Length of the training, in passes over the training images (fractions allowed).
  epochs: float = 90.0
  # Label smoothing, in [0, 1), and the loss: "softmax" or "sigmoid" cross-entropy.
  label_smoothing: float = 0.1
  loss: str = "softmax"
  # Seeds the parameters, the order of the images, their augmentation, dropout and stochastic depth.
  seed: int = 0
  # Steps between two log lines (the only moments at which the loop waits for the device).
  log_every: int = 50
  # Epochs between two evaluations, and between two checkpoints; the end always has both.
  eval_every: float = 1.0
  checkpoint_every: float = 1.0
  # Checkpoints to keep, newest first.
  keep_checkpoints: int = 3

  def __post_init__(self) -> None:
    self.validate()

  def validate(self) -> None:
    for section in (self.model, self.data, self.optim):
      section.validate()
    for field in ("batch", "eval_batch", "log_every", "keep_checkpoints"):
      value = getattr(self, field)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Config.{field} = {value!r}: expected a whole number >= 1.")
    for field in ("epochs", "eval_every", "checkpoint_every"):
      value = getattr(self, field)
      if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"Config.{field} = {value!r}: expected a finite number of epochs > 0.")
    if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
      raise ValueError(f"Config.seed = {self.seed!r}: expected a whole number in [0, 2**32).")
    if not isinstance(self.label_smoothing, (int, float)) or not 0 <= self.label_smoothing < 1:
      raise ValueError(f"Config.label_smoothing = {self.label_smoothing!r}: expected a number in [0, 1).")
    if self.loss not in ("softmax", "sigmoid"):
      raise ValueError(f"Config.loss = {self.loss!r}: expected 'softmax' or 'sigmoid'.")
