"""What experiments look at: real images, scikit-learn's digits, and the network that a user names."""

import functools
import importlib.util
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfnets import models
from nfnets.data.sources.builtin import digits
from nfnets.errors import UserError

MEAN, STD = 77.8, 95.9  # of the digits' pixels, as in configs/digits.py


@functools.cache
def _split(split: str) -> tuple[np.ndarray, np.ndarray]:
  source = digits(split)
  records = [source[i] for i in range(len(source))]
  images = np.stack([np.asarray(record.image) for record in records])
  return images, np.array([record.label for record in records], np.int32)


def images(count: int | None = None, *, split: str = "train", seed: int = 0, side: int = 8) -> tuple[jax.Array, jax.Array]:
  """Digits, normalised, and their labels.

  Args:
    count: how many, chosen by `seed`; None takes all, in their order.
    split: "train" (1,437) or "test" (360).
    seed: of the choice.
    side: pixels a side, of which 8 are real; the nearest one is taken for others.

  Returns:
    float32 [count, side, side, 3] and int32 [count].
  """
  pixels, labels = _split(split)
  if count is not None:
    chosen = np.random.default_rng(seed).permutation(len(labels))[:count]
    pixels, labels = pixels[chosen], labels[chosen]
  nearest = np.arange(side) * pixels.shape[1] // side
  pixels = pixels[:, nearest][:, :, nearest]
  return jnp.asarray((pixels.astype(np.float32) - MEAN) / STD), jnp.asarray(labels)


def user_model(name: str, *, seed: int) -> tuple[nnx.Module, int, dict[str, Any]]:
  """Makes the network that a user names, with new weights.

  Args:
    name: a name of nfnets.models, or FILE.py:FUNCTION, where FUNCTION(seed) returns an nnx.Module; its attribute `image_size`, if
      it has one, says how many pixels a side it takes.
    seed: of its weights.

  Returns:
    The network; the side of its images, pixels; and the arguments that say that it trains.

  Raises:
    UserError: there is no such model, file or function, or it makes something else.
  """
  file, colon, function = name.rpartition(":")
  if not colon:
    network = models.create(name, 10, rngs=seed, drop_rate=0.0, stochastic_depth=0.0)
    for _, module in nnx.iter_modules(network):
      if hasattr(module, "skip_gain") and module.skip_gain is not None:
        module.skip_gain[...] = jnp.ones(())  # at 0, as they are initialised, blocks would add nothing that could be seen
    kernel = network.fc.kernel
    if not np.any(kernel[...]):  # nor would any gradient pass a classifier of zeros
      kernel[...] = jax.random.normal(jax.random.key(seed), kernel.shape) * kernel.shape[0] ** -0.5
    return network, min(32, models.variant(name).train_resolution), {"train": True}
  if not pathlib.Path(file).is_file():
    raise UserError(f"--model={name}: no file {file}; expected a name of nfnets.models or FILE.py:FUNCTION")
  spec = importlib.util.spec_from_file_location("nfnets_lab_user_model", file)
  if spec is None or spec.loader is None:
    raise UserError(f"--model={name}: {file} is no Python file")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:  # whatever a person's file raises is theirs to mend
    raise UserError(f"--model={name}: {file} cannot be run: {type(error).__name__}: {' '.join(str(error).split())}") from error
  make = getattr(module, function, None)
  if not callable(make):
    raise UserError(f"--model={name}: no function {function} in {file}")
  network = make(seed)
  if not isinstance(network, nnx.Module):
    raise UserError(f"--model={name}: expected an nnx.Module from {function}({seed}), got {type(network).__name__}")
  network.train()
  return network, getattr(network, "image_size", 32), {}
