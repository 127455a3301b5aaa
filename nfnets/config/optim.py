"""How to update: optimizer, schedule, clipping, averaging."""

import dataclasses
import math

from nfnets.config import checks
from nfnets.errors import UserError

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
    UserError: a field has a wrong type or range, names an unknown choice, or is not read by the chosen optimizer.
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

  # Momentum coefficient of SGD and LARS, in [0, 0.999999]; 0 keeps no momentum buffer.
  momentum: float = 0.9
  # Nesterov momentum for SGD and LARS; None = as published: True for SGD, False for LARS.
  nesterov: bool | None = None
  # Weight decay per step, on kernels only: added to the gradient (SGD, LARS) or times the learning rate (AdamW).
  weight_decay: float = 2e-5
  # AdamW: decay of the first moment, in [0, 0.999999].
  b1: float = 0.9
  # AdamW: decay of the second moment, in [0, 0.999999].
  b2: float = 0.999
  # AdamW: added to the root of the second moment.
  eps: float = 1e-8
  # LARS: local learning rate as a fraction of ‖w‖/‖update‖.
  trust_coefficient: float = 0.001

  # Layer-wise learning rates: each block from the classifier down learns at this share of the rate of the one above it, the stem
  # slowest (1801.06146, section 3.2); 1 = all alike. For networks that begin with trained weights.
  layer_decay: float = 1.0
  # Path patterns (regular expressions) of the parameters that stay as they are, such as ('^stem/', '^blocks/[0-3]/'). BatchNorm's
  # running statistics still follow the images.
  frozen: tuple[str, ...] = ()

  # AGC's lambda, the largest ‖gradient‖/‖weight‖ of a unit; None or inf = off (a command line can say inf, not None).
  clipping: float | None = 0.01
  # AGC: floor of ‖weight‖, so that parameters initialised to zero can move.
  agc_eps: float = 1e-3
  # AGC: path patterns (regular expressions) to leave unclipped, beside those the model itself marks (its classifier).
  agc_exclude: tuple[str, ...] = ()
  # AGC: keep clip fractions and largest ratios in the optimizer's state for the logs.
  agc_track: bool = False

  # Sharpness-aware minimization (SAM, 2010.01412): how far the weights ascend before the gradient is taken; 0 = plain steps. The
  # ascent uses this share of each device's images and is not averaged over devices (NFNets paper, appendix A: 0.05, 0.2).
  sam_rho: float = 0.0
  sam_share: float = 0.2

  # Decay of the parameters' moving average per step, in [0, 1), warmed up as (1 + t)/(10 + t); None = no average.
  ema_decay: float | None = 0.99999

  def __post_init__(self) -> None:
    self.validate()

  def validate(self) -> None:
    """Checks every field; raises UserError naming the field, the value got and what was expected."""
    checks.validate(self, _RULES)
    for field in dataclasses.fields(self):
      readers = _READ_BY.get(field.name, OPTIMIZERS)
      value = getattr(self, field.name)
      if self.name not in readers and value != field.default:
        raise UserError(
          f"OptimConfig.{field.name} = {value!r} has no effect: only {' and '.join(readers)} read it, and name is "
          f"{self.name!r}. Leave it at its default {field.default!r} or change OptimConfig.name."
        )
    if self.schedule == "constant" and self.end_lr != 0:
      raise UserError(
        f"OptimConfig.end_lr = {self.end_lr!r} has no effect with schedule 'constant'. Set it to 0 or choose 'cosine'."
      )
    if self.name == "sgd" and self.nesterov and self.momentum == 0:
      raise UserError("OptimConfig.nesterov = True needs momentum > 0, got momentum 0. Raise it or unset nesterov.")


# That no update of finite gradients overflows (`is_bad` in nfnets/train/step/step.py) rests on the ends of these ranges.
_rate = checks.number("a number in (0, 1e4]", lambda value: 0 < value <= 1e4)
_remembers = checks.number("a number in [0, 0.999999]", lambda value: 0 <= value <= 0.999999)
_RULES: dict[str, checks.Rule] = {
  "name": checks.choice(*OPTIMIZERS),
  "base_lr": _rate,
  "scale_lr": checks.flag,
  "end_lr": checks.number("a number in [0, 1e4]", lambda value: 0 <= value <= 1e4),
  "schedule": checks.choice(*SCHEDULES),
  "warmup_epochs": checks.not_negative(),
  "momentum": _remembers,
  "nesterov": checks.optional(checks.flag, "True, False or None"),
  "weight_decay": checks.number("a number in [0, 1000]", lambda value: 0 <= value <= 1000),
  "b1": _remembers,
  "b2": _remembers,
  "eps": checks.number("a number of at least 1e-30", lambda value: 1e-30 <= value < math.inf),
  "trust_coefficient": _rate,
  "layer_decay": checks.number("a number in (0, 1]", lambda value: 0 < value <= 1),
  "frozen": checks.patterns,
  "clipping": checks.optional(checks.number("a number > 0, or None (or inf) for no clipping", lambda value: value > 0)),
  "agc_eps": checks.positive(),
  "agc_exclude": checks.patterns,
  "agc_track": checks.flag,
  "sam_rho": checks.not_negative(),
  "sam_share": checks.number("a number in (0, 1]", lambda value: 0 < value <= 1),
  "ema_decay": checks.optional(checks.share("a number in [0, 1), or None for no average")),
}
