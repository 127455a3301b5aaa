"""Compares our outputs with timm's own on the same weights, where timm and torch are installed."""

import itertools

import jax
import numpy as np
from flax import nnx

from nfnets import models
from nfnets.weights import writer
from nfnets.weights.errors import WeightsError
from nfnets.weights.network import build
from nfnets.weights.stored import Stored

SIZE = 96  # pixels of the random images that are compared


def against_timm(stored: Stored) -> list[tuple[str, float]]:
  """Returns (stage, norm of the difference / norm of timm's output) for each stage, the pooled features and the logits.

  Raises:
    WeightsError: timm or torch is not installed, or timm has no such network.
  """
  converted = writer.convert(stored, "timm")
  try:
    import timm  # pyrefly: ignore
    import torch  # pyrefly: ignore
  except ImportError as error:
    raise WeightsError(f"--check compares with timm, and {error.name} is not installed; pip install timm torch") from error
  images = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
  theirs = timm.create_model(converted.network, num_classes=stored.num_classes).eval()
  theirs.load_state_dict({name: torch.tensor(array) for name, array in converted.arrays.items()}, strict=True)
  outputs = {}
  with torch.no_grad():
    x = theirs.stem(torch.tensor(images).permute(0, 3, 1, 2))
    for i, stage in enumerate(theirs.stages):
      x = outputs[f"stage {i + 1}"] = stage(x)
    x = theirs.final_act(theirs.final_conv(x))
    outputs |= {"pool": x.mean((2, 3)), "logits": theirs.forward_head(x)}
  ours = _ours(stored, images)
  as_ours = lambda output: output.numpy().transpose(0, 2, 3, 1) if output.ndim == 4 else output.numpy()
  return [(stage, _error(ours[stage], as_ours(output))) for stage, output in outputs.items()]


def _ours(stored: Stored, images: np.ndarray) -> dict[str, np.ndarray]:
  """The same outputs of our network."""
  model = stored.config.model
  depth = models.variant(model.name, **model.all_overrides()).depth
  last = {f"blocks/{end - 1}": f"stage {i + 1}" for i, end in enumerate(itertools.accumulate(depth))}
  graph, state = nnx.split(build(stored, dtype="float32"))

  @jax.jit
  def outputs(state, images):
    seen = {}

    def tap(name, x):
      if name in last or name in ("pool", "logits"):
        seen[last.get(name, name)] = x

    nnx.merge(graph, state).outputs(images, tap=tap)
    return seen

  return {name: np.asarray(value) for name, value in outputs(state, images).items()}


def _error(ours: np.ndarray, theirs: np.ndarray) -> float:
  return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
