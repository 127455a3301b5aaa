"""Which network to train."""

import dataclasses
from typing import Any

from nfnets.config import checks


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
  # Activation, one of nfnets.models.activations.ACTIVATIONS.
  activation: str | None = None
  # Recompute each block's activations in the backward pass: less memory, about a third more time.
  remat: bool = False
  # Equal blocks of a stage run in a loop, their parameters stacked: F5 compiles in under a third of the CPU time, and a step
  # takes more memory (docs/speed.md). For small networks it gains little; on GPUs it has not been measured.
  scan: bool = False
  # Any other field of the variant's row, e.g. {"stem_strides": (1, 1, 1, 1)}.
  overrides: dict[str, Any] = dataclasses.field(default_factory=dict)

  def all_overrides(self) -> dict[str, Any]:
    """What to hand to `models.create` beside the name."""
    named = {field: getattr(self, field) for field in ("drop_rate", "stochastic_depth", "activation")}
    switches = {name: True for name in ("remat", "scan") if getattr(self, name)}
    return {**self.overrides, **{name: value for name, value in named.items() if value is not None}, **switches}

  def validate(self) -> None:
    """Checks every field but whether the variant has it; raises UserError."""
    checks.validate(self, _RULES)


_RULES: dict[str, checks.Rule] = {
  "name": checks.name,
  "dtype": checks.choice("float32", "bfloat16"),
  "drop_rate": checks.optional(checks.share("a probability, 0 ≤ rate < 1")),
  "stochastic_depth": checks.optional(checks.share("a probability, 0 ≤ rate < 1")),
  "activation": checks.optional(checks.name),
  "remat": checks.flag,
  "scan": checks.flag,
  "overrides": checks.mapping,
}
