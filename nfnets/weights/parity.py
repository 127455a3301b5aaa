"""Compares our outputs with timm's own on the same weights, where timm and torch are installed."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from nfnets.weights import writer
from nfnets.weights.errors import WeightsError
from nfnets.weights.network import build
from nfnets.weights.stored import Stored

SIZE = 96  # pixels of the random images that are compared


def timm_module(stored: Stored) -> Any:
  """Makes timm's own network, a torch.nn.Module in evaluation mode, with these weights.

  Raises:
    WeightsError: timm or torch is not installed, or timm has no such network.
  """
  converted = writer.convert(stored, "timm")
  try:
    import timm  # pyrefly: ignore
    import torch  # pyrefly: ignore
  except ImportError as error:
    raise WeightsError(f"{error.name} is not installed, which a comparison with timm needs; pip install timm torch") from error
  theirs = timm.create_model(converted.network, num_classes=stored.num_classes).eval()
  theirs.load_state_dict({name: torch.tensor(array) for name, array in converted.arrays.items()}, strict=True)
  return theirs


def against_timm(stored: Stored) -> list[tuple[str, float]]:
  """Returns (stage, norm of the difference / norm of timm's output), of a stage the largest of its blocks, of pool and logits.

  Raises:
    WeightsError: timm or torch is not installed, or timm has no such network.
  """
  theirs = timm_module(stored)
  import torch  # pyrefly: ignore

  images = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
  outputs: list[tuple[str, str, Any]] = []  # stage, our name of the place, timm's output there
  with torch.no_grad():
    x = theirs.stem(torch.tensor(images).permute(0, 3, 1, 2))
    for number, stage in enumerate(theirs.stages, start=1):
      for block in stage:
        x = block(x)
        outputs.append((f"stage {number}", f"blocks/{len(outputs)}", x))
    x = theirs.final_act(theirs.final_conv(x))
    outputs += [("pool", "pool", x.mean((2, 3))), ("logits", "logits", theirs.forward_head(x))]
  ours = _ours(stored, images, {place for _, place, _ in outputs})
  worst: dict[str, float] = {}
  for stage, place, output in outputs:
    expected = output.numpy().transpose(0, 2, 3, 1) if output.ndim == 4 else output.numpy()
    error = float(np.linalg.norm(ours[place] - expected) / np.linalg.norm(expected))
    worst[stage] = max(worst.get(stage, 0.0), error)
  return list(worst.items())


def _ours(stored: Stored, images: np.ndarray, places: set[str]) -> dict[str, np.ndarray]:
  """The same outputs of our network, by its names of the places."""
  graph, state = nnx.split(build(stored, dtype="float32"))

  @jax.jit
  def outputs(state, images):
    seen = {}

    def tap(name, x):
      if name in places:
        seen[name] = x

    nnx.merge(graph, state).outputs(images, tap=tap)
    return seen

  return {name: np.asarray(value) for name, value in outputs(state, images).items()}
