"""Small files of weights, and folders of pictures, for the tests of what is done with trained networks."""

import json
import pathlib

import numpy as np
import safetensors.numpy
from flax import nnx
from PIL import Image

from nfnets import models
from nfnets.agc import named_leaves
from nfnets.config import Config, DataConfig, ModelConfig
from nfnets.train.checkpoints.compatibility import to_json

TINY = {"width": (16,), "depth": (1,), "stage_strides": (1,)}
AS_STORED = {"crop": "none", "size": None, "interpolation": "bicubic", "mean": [77.8] * 3, "std": [95.9] * 3}
SQUASHED = {**AS_STORED, "crop": "squash", "size": 16}


def write_weights(path: pathlib.Path, *, classes: int = 10, seed: int = 0, change=lambda name, array: array, **metadata) -> str:
  """Writes random weights of a tiny network, in which everything takes part, as an export would; returns the path as text."""
  network = models.create("nf_resnet_tiny", classes, rngs=seed, **TINY)
  rng, arrays = np.random.default_rng(seed), {}
  for name, leaf, _ in named_leaves(nnx.state(network, nnx.Param)):
    noise = 0.3 * rng.normal(size=leaf.shape)
    arrays[name] = np.asarray(change(name, np.asarray(leaf) + noise), np.float32)
  config = Config(model=ModelConfig(name="nf_resnet_tiny", overrides=TINY), data=DataConfig(name="digits"))
  facts = {
    "format": "nfnets",
    "config": to_json(config),
    "num_classes": classes,
    "class_names": [str(label) for label in range(classes)],
    "preprocessing": AS_STORED,
    **metadata,
  }
  safetensors.numpy.save_file(
    arrays, path, {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
  )
  return str(path)


def write_pictures(
  directory: pathlib.Path, counts: dict[str, int], size: tuple[int, int] = (20, 24), suffix: str = "png"
) -> None:
  """Writes random pictures DIRECTORY/CLASS/N.png, so many of each class."""
  rng = np.random.default_rng(0)
  for name, count in counts.items():
    (directory / name).mkdir(parents=True)
    for number in range(count):
      Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(directory / name / f"{number}.{suffix}")
