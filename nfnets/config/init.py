"""Which weights a run begins with."""

import dataclasses

from nfnets.config import checks


@dataclasses.dataclass(slots=True, kw_only=True)
class InitConfig:
  """Which weights a run begins with; a run that goes on from its own checkpoint does not look at them."""

  # A file of weights (ours, Haiku's or timm's), hf://OWNER/NAME, a workdir, or WORKDIR/checkpoints/STEP; empty = drawn.
  weights: str = ""
  # Draws the classifier anew: for other classes than those of the weights.
  new_head: bool = False

  def validate(self) -> None:
    """Checks every field; raises UserError naming the field, the value got and what was expected."""
    checks.validate(self, _RULES)


_RULES: dict[str, checks.Rule] = {"weights": checks.text, "new_head": checks.flag}
