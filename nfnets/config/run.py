"""A whole training run."""

import dataclasses
import math

from nfnets.config.checks import check_choice, check_number, invalid
from nfnets.config.data import DataConfig
from nfnets.config.model import ModelConfig
from nfnets.config.optim import OptimConfig
from nfnets.errors import UserError


@dataclasses.dataclass(slots=True, kw_only=True)
class Config:
  """A whole training run. Values that follow from others (steps, learning rate) are computed where they are used.

  Raises (from `validate`, which the programs call after the command line's overrides):
    UserError: a field has a wrong value; the message names it.
  """

  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)

  # Images a training step, over all devices; and images an evaluation step (any number: the last batch is padded).
  batch: int = 256
  eval_batch: int = 256
  # Parts that each device takes its share of a batch in, one after the other (gradient accumulation): less memory. 1 = at once.
  # BatchNorm normalizes each part by itself.
  accumulate: int = 1
  # Divides parameters, optimizer state and averages among the devices (as ZeRO and FSDP do) instead of a copy on each.
  shard: bool = False
  # What BatchNorm's statistics are taken over in training: the "global" batch, or each "device"'s share of it.
  batch_stats: str = "global"
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
  # Checkpoints to keep, newest first; beside them one every so many epochs for ever (0 = none), and the best by a metric of
  # the evaluations: "top1", "top5", "loss", with "ema_" before it those of the average ("" = none).
  keep_checkpoints: int = 3
  keep_every: float = 0.0
  keep_best: str = ""
  # A bad step is one whose loss, gradients or update is not finite, or whose loss is above `spike` × its running mean (0 = any
  # loss will do). "stop" ends the run, "skip" leaves the update out, "rollback" goes on from the last checkpoint with the images
  # that come after; the run stops after so many bad steps.
  on_bad_step: str = "stop"
  spike: float = 0.0
  max_bad_steps: int = 10
  # Seconds without a finished step after which a process writes down its threads' stacks and exits (0 = never): one process that
  # hangs would hold up all others for ever.
  watchdog: float = 1800.0

  def __post_init__(self) -> None:
    self.validate()

  def validate(self) -> None:
    for section in (self.model, self.data, self.optim):
      section.validate()
    for field in ("batch", "eval_batch", "accumulate", "log_every", "keep_checkpoints", "max_bad_steps"):
      value = getattr(self, field)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"Config.{field} = {value!r}: expected a whole number >= 1.")
    for field in ("epochs", "eval_every", "checkpoint_every"):
      value = getattr(self, field)
      if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"Config.{field} = {value!r}: expected a finite number of epochs > 0.")
    for field in ("keep_every", "watchdog", "spike"):
      check_number(field, getattr(self, field), "a finite number >= 0", lambda x: 0 <= x < math.inf, "Config")
    for field, choices in _CHOICES.items():
      check_choice(field, getattr(self, field), choices, "Config")
    if not isinstance(self.shard, bool):
      raise invalid("shard", self.shard, "True or False", "Config")
    if 0 < self.spike <= 1:
      raise invalid("spike", self.spike, "a factor > 1 (or 0: any loss will do)", "Config")
    if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
      raise UserError(f"Config.seed = {self.seed!r}: expected a whole number in [0, 2**32).")
    if not isinstance(self.label_smoothing, (int, float)) or not 0 <= self.label_smoothing < 1:
      raise UserError(f"Config.label_smoothing = {self.label_smoothing!r}: expected a number in [0, 1).")


_METRICS = tuple(f"{average}{metric}" for average in ("", "ema_") for metric in ("top1", "top5", "loss"))


_CHOICES = {
  "loss": ("softmax", "sigmoid"),
  "batch_stats": ("global", "device"),
  "keep_best": ("", *_METRICS),
  "on_bad_step": ("stop", "skip", "rollback"),
}
