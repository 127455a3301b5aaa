"""NFNets: normalizer-free networks in JAX/Flax.

`from nfnets import agc` is the optax transformation; `nfnets.models.create("nfnet_f0")` a network. What touches data, files or
processes lives in `nfnets.data`, `nfnets.distributed`, `nfnets.train`, `nfnets.measure` and the programs in `launch/`, and is not
imported from here.
"""

from nfnets import models
from nfnets.agc import AGCState, agc, agc_metrics, explain

__all__ = ["AGCState", "agc", "agc_metrics", "explain", "models"]
__version__ = "0.1.0"
