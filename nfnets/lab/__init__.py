"""The laboratory: seeing why it works without normalization. Published claims are measured; what trains for use lies elsewhere.

  from nfnets import lab
  lab.signal(model, images)                   # mean, variance and squared channel mean of every submodule's output
  lab.gradient_norms(model, images, labels)   # of every parameter
  lab.similarity(features)                    # cosine, stable rank, orthogonality gap
  lab.sharpness(loss, params)                 # largest eigenvalue of the Hessian

`model` is any nnx.Module. `python -m launch.lab` runs the experiments, which only arrange these measures.
"""

from nfnets.lab.measures.curvature import sharpness, sharpness_of
from nfnets.lab.measures.geometry import similarity
from nfnets.lab.measures.signals import gradient_norms, moments, signal

__all__ = ["gradient_norms", "moments", "sharpness", "sharpness_of", "signal", "similarity"]
