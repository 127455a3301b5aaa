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


def _invalid(field: str, value: object, expected: str, kind: str = "OptimConfig") -> ValueError:
  return ValueError(f"{kind}.{field} = {value!r}: expected {expected}.")


def _check_choice(field: str, value: object, choices: tuple[str, ...], kind: str = "OptimConfig") -> None:
  if value in choices:
    return
  near = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.5)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  raise ValueError(f"{kind}.{field} = {value!r}: expected one of {', '.join(map(repr, choices))}.{hint}")


def _check_number(field: str, value: object, expected: str, accepts, kind: str = "OptimConfig") -> None:
  # NaN fails every comparison, so it never passes `accepts`.
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not accepts(value):
    raise _invalid(field, value, expected, kind)


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
  """Which images, and what is done to them before the network sees them.

  None leaves a field to what it follows from: the data, or the row of the model's variant (see `nfnets.train.recipe`).
  """

  # "digits" (scikit-learn's, in the wheel), "synthetic", "folder" (a directory per class), or a prepared TFDS dataset.
  name: str = "digits"
  # Where TFDS datasets are prepared (a disk, gs://, s3://), or the image folder. Empty = ~/tensorflow_datasets.
  dir: str = ""
  # Where offset indices of TFRecord shards are kept (a bucket too); empty = $XDG_CACHE_HOME/nfnets or ~/.cache/nfnets.
  index_dir: str = ""
  # Split expressions of TFDS, such as "train[10000:]" or "train[:98%]".
  train_split: str = "train"
  test_split: str = "test"
  # Names of the image's and the label's feature.
  image_key: str = "image"
  label_key: str = "label"
  # Classes of the classifier; must be what the data has. None = as the data says.
  num_classes: int | None = None
  # Side of the square images, pixels, in training and in evaluation. None = as stored where images are not resized,
  # else the variant's.
  image_size: int | None = None
  test_image_size: int | None = None

  # Training images: "none" (as stored) or "inception" (a random part, resized; 1602.07261 and the official pipeline).
  train_crop: str = "none"
  # The part's share of the image's area (parts of less than 0.1 are drawn again, as published), and its width / height.
  crop_area: tuple[float, float] = (0.08, 1.0)
  crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
  # Evaluation images: "none"; "squash" to size + 32 and crop the centre (NFNets); "crop" the centre, size / (size + 32) of
  # the shorter side, and resize (ResNets); "short_side" resized to size / 0.875 and crop the centre.
  test_crop: str = "none"
  # Random shift by up to this many pixels each way (edges repeat), and mirroring of half the images.
  shift: int = 0
  flip: bool = False
  # "none", "mixup", "cutmix", or "mixup_cutmix": each on half the batch.
  mix: str = "none"
  # Parameter of mixup's Beta(a, a).
  mixup_alpha: float = 0.2
  # What an image is mixed with: its neighbour in the "batch", or a "second" batch, which doubles the decoding (official).
  mix_with: str = "batch"
  # "none", "randaugment" or "autoaugment" (policy v0); before mixing, or after it (NFNets).
  augment: str = "none"
  augment_before_mix: bool = False
  # RandAugment: operations one after the other, and their magnitude (0-30). None = the variant's.
  randaugment_layers: int | None = None
  randaugment_magnitude: float | None = None
  # Every image stands this many times in a batch, differently augmented (repeated augmentation, 2310.16764).
  repeats: int = 1

  # Threads that decode; None = one a core.
  threads: int | None = None
  # Records that lie together and are read together; their blocks are shuffled, then records among 16 blocks. None = 1 (a
  # full shuffle) on disks, 32 in buckets.
  shuffle_block: int | None = None
  # Training stops when more than this share of the dataset's records is found corrupt; fewer are replaced and counted.
  max_corrupt: float = 0.01
  # Per channel, on the scale 0-255; subtracted and divided by on the device. ImageNet's.
  mean: tuple[float, ...] = (123.675, 116.28, 103.53)
  std: tuple[float, ...] = (58.395, 57.12, 57.375)

  def validate(self) -> None:
    """Checks every field; raises ValueError naming the field, the value got and what was expected."""
    for field, choices in _DATA_CHOICES.items():
      _check_choice(field, getattr(self, field), choices, "DataConfig")
    for field in ("name", "train_split", "test_split", "image_key", "label_key"):
      if not isinstance(getattr(self, field), str) or not getattr(self, field):
        raise _invalid(field, getattr(self, field), "a name", "DataConfig")
    for field, least in (("num_classes", 1), ("image_size", 1), ("test_image_size", 1), ("shift", 0), ("repeats", 1),
                         ("randaugment_layers", 1), ("threads", 1), ("shuffle_block", 1)):
      value = getattr(self, field)
      if value is None and field not in ("shift", "repeats"):
        continue
      if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _invalid(field, value, f"a whole number >= {least}", "DataConfig")
    for field in ("flip", "augment_before_mix"):
      if not isinstance(getattr(self, field), bool):
        raise _invalid(field, getattr(self, field), "True or False", "DataConfig")
    _check_number("mixup_alpha", self.mixup_alpha, "a number > 0", lambda x: 0 < x < math.inf, "DataConfig")
    _check_number("max_corrupt", self.max_corrupt, "a share in [0, 1]", lambda x: 0 <= x <= 1, "DataConfig")
    if self.randaugment_magnitude is not None:
      _check_number("randaugment_magnitude", self.randaugment_magnitude, "a number in [0, 30]", lambda x: 0 <= x <= 30,
                    "DataConfig")
    for field, most in (("crop_area", 1), ("crop_aspect", math.inf)):
      value = getattr(self, field)
      if len(value) != 2 or not 0 < value[0] <= value[1] <= most or most == 1 and value[1] < 0.1:
        raise _invalid(field, value, f"two numbers, 0 < least <= most{', 0.1 <= most <= 1' if most == 1 else ''}", "DataConfig")
    for field in ("mean", "std"):
      value = getattr(self, field)
      if len(value) != 3 or not all(isinstance(v, (int, float)) for v in value) or field == "std" and min(value) <= 0:
        raise _invalid(field, value, f"three numbers{' > 0' if field == 'std' else ''}", "DataConfig")


_DATA_CHOICES = {
  "train_crop": ("none", "inception"),
  "test_crop": ("none", "squash", "crop", "short_side"),
  "mix": ("none", "mixup", "cutmix", "mixup_cutmix"),
  "mix_with": ("batch", "second"),
  "augment": ("none", "randaugment", "autoaugment"),
}


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
