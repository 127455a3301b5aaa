"""The networks: `create(name)` makes one, `names()` lists them, `variant(name)` and `describe(name)` say what one is made of.

  from flax import nnx
  from nfnets import models
  net = models.create("nfnet_f0", num_classes=1000, rngs=nnx.Rngs(0), dtype="bfloat16")
  logits = net(images)                                   # images [batch, height, width, 3], normalised
  logits = net(images, train=True, rngs=nnx.Rngs(1))     # with dropout and stochastic depth
  net.outputs(images)["pool"]                            # or "features", or "logits"
  net = models.create("nfnet_f0", weights="F0_haiku.npz")

This room knows nothing of data, training or files; `weights=` asks the room that does.
"""

from nfnets.models.description import Description, describe
from nfnets.models.network import Network, signal_statistics
from nfnets.models.registry import InvalidOverrideError, UnknownModelError, UnknownOverrideError, create, names, variant

__all__ = [
  "Description",
  "InvalidOverrideError",
  "Network",
  "UnknownModelError",
  "UnknownOverrideError",
  "create",
  "describe",
  "names",
  "signal_statistics",
  "variant",
]
