"""The laboratory: seeing why it works without normalization. Published claims are measured; what trains for use lies elsewhere.

  from nfnets import lab
  lab.signal(model, images)                   # mean, variance and squared channel mean of every submodule's output
  lab.gradient_norms(model, images, labels)   # of every parameter
  lab.similarity(features)                    # cosine, stable rank, orthogonality gap
  lab.sharpness(loss, params)                 # largest eigenvalue of the Hessian
  lab.covariate_shift(loss, before, after, layers)
  lab.along_gradient(loss, params, steps)     # loss, change of the gradient, effective smoothness
  lab.nf_twin("resnet50", 1000, rngs=0)       # the same network without normalization

`model` is any nnx.Module, or a Linen module that is bound to its variables. `python -m launch.lab` runs the experiments, which
only arrange these measures.
"""

from nfnets.lab.measures.curvature import batch_sharpness, sharpness, sharpness_of
from nfnets.lab.measures.geometry import similarity
from nfnets.lab.measures.landscape import along_gradient, batch_norm_bound, filter_direction, plane
from nfnets.lab.measures.shift import covariate_shift, layer_numbers
from nfnets.lab.measures.signals import gradient_norms, moments, signal
from nfnets.lab.twin import BatchNormKit, NormFreeKit, nf_twin

__all__ = [
  "BatchNormKit",
  "NormFreeKit",
  "along_gradient",
  "batch_norm_bound",
  "batch_sharpness",
  "covariate_shift",
  "filter_direction",
  "gradient_norms",
  "layer_numbers",
  "moments",
  "nf_twin",
  "plane",
  "sharpness",
  "sharpness_of",
  "signal",
  "similarity",
]
