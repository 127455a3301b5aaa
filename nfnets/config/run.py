"""A whole training run."""

import dataclasses

from nfnets.config import checks
from nfnets.config.data import DataConfig
from nfnets.config.init import InitConfig
from nfnets.config.model import ModelConfig
from nfnets.config.optim import OptimConfig


@dataclasses.dataclass(slots=True, kw_only=True)
class Config:
  """A whole training run. Values that follow from others (steps, learning rate) are computed where they are used.

  Raises:
    UserError: a field has a wrong value; the message names it. Programs call `validate` again after the command line's
      overrides.
  """

  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
  init: InitConfig = dataclasses.field(default_factory=InitConfig)

  # Images a training step, over all devices; and images an evaluation step (any number: the last batch is padded).
  batch: int = 256
  eval_batch: int = 256
  # Parts that each device takes its share of a batch in, one after the other (gradient accumulation): less memory. 1 = at once.
  # BatchNorm normalizes each part by itself.
  accumulate: int = 1
  # Keeps parameters, optimizer state and averages split among the devices instead of a copy on each. Every step gathers all
  # weights at once, whole on each device: what is saved is the state's memory (as in ZeRO), not that of the weights (as in FSDP).
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
    """Checks every field of every section; raises UserError naming the field, the value got and what was expected."""
    checks.validate(self, _RULES)
    if 0 < self.spike <= 1:
      raise checks.refused(self, "spike", self.spike, "a factor > 1 (or 0: any loss will do)")


_METRICS = tuple(f"{average}{metric}" for average in ("", "ema_") for metric in ("top1", "top5", "loss"))
_EPOCHS = checks.positive("a finite number of epochs > 0")
_RULES: dict[str, checks.Rule] = {
  "model": checks.section,
  "data": checks.section,
  "optim": checks.section,
  "init": checks.section,
  "batch": checks.whole(1),
  "eval_batch": checks.whole(1),
  "accumulate": checks.whole(1),
  "shard": checks.flag,
  "batch_stats": checks.choice("global", "device"),
  "epochs": _EPOCHS,
  "label_smoothing": checks.share(),
  "loss": checks.choice("softmax", "sigmoid"),
  "seed": checks.whole(0, 2**32),
  "log_every": checks.whole(1),
  "eval_every": _EPOCHS,
  "checkpoint_every": _EPOCHS,
  "keep_checkpoints": checks.whole(1),
  "keep_every": checks.not_negative(),
  "keep_best": checks.choice("", *_METRICS),
  "on_bad_step": checks.choice("stop", "skip", "rollback"),
  "spike": checks.not_negative(),
  "max_bad_steps": checks.whole(1),
  "watchdog": checks.not_negative(),
}
