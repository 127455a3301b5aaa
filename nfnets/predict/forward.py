"""A trained network compiled over all devices: uint8 images in, what is read of the network out, the same on every process."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from nfnets import models
from nfnets.config import DataConfig
from nfnets.train.step import sharding
from nfnets.train.step.gradients import normalise


def over_devices(
  network: models.Network, data: DataConfig, mesh: Mesh, read: Callable[[models.Network, jax.Array], Any]
) -> Callable[[np.ndarray], Any]:
  """Compiles `read(network, normalised images)` over the devices.

  Args:
    network: its weights are copied to each device.
    data: mean and std are read here.
    mesh: the devices, of all processes.
    read: returns a tree of arrays whose rows belong to the images.

  Returns:
    A function of this process's rows of a batch, uint8 [rows, H, W, 3], a multiple of its devices. It returns at once; the tree
    has the rows of all processes, one process after the other, on every device.
  """
  graph, state = nnx.split(network)
  state = sharding.put(state, sharding.place(mesh, state))
  whole = sharding.replicated(mesh)
  step = jax.jit(
    lambda state, images: read(nnx.merge(graph, state), normalise(images, data)),
    in_shardings=(whole, sharding.batch_sharding(mesh)),
    out_shardings=whole,
  )
  return lambda images: step(state, sharding.put_batch(mesh, {"image": images})["image"])


def logits(network: models.Network, images: jax.Array) -> jax.Array:
  """Float32 [batch, classes]."""
  return network(images)


def flipped_logits(network: models.Network, images: jax.Array) -> jax.Array:
  """The mean of the logits of each image and of its mirror image."""
  return (network(images) + network(images[:, :, ::-1])) / 2
