"""Layer-wise learning rates: the further below the classifier a layer lies, the slower it learns."""

import re
from typing import Any

from nfnets.config import OptimConfig
from nfnets.errors import UserError
from nfnets.optim.groups import leaves, listing

# Names of our models. What is neither of these (final_conv, final_norm, Fixup's bias2) lies between the last block and `fc`.
_BELOW = re.compile(r"(stem/|bias1$)")
_BLOCK = re.compile(r"blocks/(\d+)/")
_HEAD = re.compile(r"fc/")


def layer_rates(params: Any, config: OptimConfig) -> dict[str, float]:
  """What the learning rate of each parameter is multiplied by (Howard and Ruder 2018, 1801.06146, section 3.2).

  With δ = `config.layer_decay` and N blocks: the classifier has 1, block i (from 0) δ^(N − i), the stem δ^(N + 1). What lies
  between the last block and the classifier has the last block's rate, δ.

  Args:
    params: tree of arrays or of `jax.ShapeDtypeStruct`, with the names of `nfnets.models`.
    config: `layer_decay` is read.

  Returns:
    {path: factor in (0, 1]} for every leaf, in the tree's order.

  Raises:
    UserError: the layers have other names, so that their order is not known.
  """
  paths = [path for path, _, _ in leaves(params)]
  if config.layer_decay == 1:
    return dict.fromkeys(paths, 1.0)
  blocks = [int(match[1]) for match in map(_BLOCK.match, paths) if match]
  if not blocks or not any(map(_HEAD.match, paths)):
    raise UserError(
      f"OptimConfig.layer_decay = {config.layer_decay:g}: expected parameters with the names of nfnets.models, stem/…, "
      f"blocks/N/… and fc/…, got {listing(paths)}. Set layer_decay to 1."
    )
  count = max(blocks) + 1

  def layers_above(path: str) -> int:
    if _HEAD.match(path):
      return 0
    block = _BLOCK.match(path)
    if block:
      return count - int(block[1])
    return count + 1 if _BELOW.match(path) else 1

  return {path: config.layer_decay ** layers_above(path) for path in paths}
