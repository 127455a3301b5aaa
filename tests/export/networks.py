"""Small networks of every family with weights that hide nothing: no gain is one, no bias and no skip gain zero."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from nfnets import models
from nfnets.agc import named_leaves
from nfnets.config import Config, DataConfig, ModelConfig

_TWO_STAGES = {"depth": (1, 1), "stage_strides": (1, 2)}
_L0 = {**_TWO_STAGES, "width": (32, 64), "group_width": 16, "stem_width": (8, 12, 16), "stem_features": 16}
_B0 = {"depth": (1, 2), "stage_strides": (1, 2), "width": (32, 48)}
_SMALL = {"depth": (2, 2), "width": (64, 128), "stage_strides": (1, 2)}
# By the name that a test shows: model, fields of its variant, side of the images (odd ones cut windows at the edge).
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
  "nfnet": ("nfnet_tiny", {**_TWO_STAGES, "width": (32, 64)}, 37),
  "nfnet with remat": (
    "nfnet_tiny",
    {"depth": (1, 1), "width": (32, 64), "stage_strides": (1, 2), "remat": True, "activation": "gelu_erf"},
    16,
  ),
  "nfnet_l0": ("nfnet_l0", _L0, 32),
  "eca_nfnet_l0": ("eca_nfnet_l0", _L0, 32),
  "nf_resnet": ("nf_resnet_tiny", _SMALL, 32),
  "nf_resnet with ELU": ("nf_resnet_tiny", {**_SMALL, "activation": "elu"}, 16),
  "nf_seresnet": ("nf_seresnet26", {**_SMALL, "stem_pool": True}, 32),
  "nf_ecaresnet": ("nf_ecaresnet26", _SMALL, 32),
  "nf_regnet": ("nf_regnet_b0", _B0, 32),
  "resnet, batch": ("resnet_tiny", _SMALL, 32),
  "resnet, group": ("resnet_tiny", {**_SMALL, "norm": "group"}, 16),
  "resnet, layer": ("resnet_tiny", {**_SMALL, "norm": "layer"}, 16),
  "resnet, none": ("resnet_tiny", {**_SMALL, "norm": "none", "stem_pool": True}, 32),
  "skipinit": ("skipinit_resnet_tiny", _SMALL, 32),
  "fixup": ("fixup_resnet_tiny", _SMALL, 32),
}


def make(name: str, *, dtype: str = "float32", num_classes: int = 10) -> tuple[models.Network, int]:
  """Makes the network that NETWORKS names, and says the side of its images."""
  model, overrides, size = NETWORKS[name]
  graph, state = nnx.split(nnx.eval_shape(lambda: models.create(model, num_classes, dtype=dtype, **overrides)))
  rng = np.random.default_rng(0)

  def drawn(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    name, noise = jax.tree_util.keystr(path, simple=True, separator="/"), rng.normal(size=leaf.shape).astype(np.float32)
    if "var" in name:
      return jnp.asarray(np.exp(0.3 * noise))
    if "kernel" in name:
      return jnp.asarray(1.3 * noise * np.prod(leaf.shape[:-1]) ** -0.5 + np.float32(0.01))
    return jnp.asarray(0.2 * noise + np.float32("gain" in name or "scale" in name))

  return nnx.merge(graph, jax.tree.map_with_path(drawn, state)), size


def images(size: int, batch: int = 2, seed: int = 1) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(batch, size, size, 3)).astype(np.float32)


def difference(got: Any, expected: Any) -> float:
  """The largest difference, relative to the largest expected value."""
  return float(np.abs(np.asarray(got, np.float64) - expected).max() / np.abs(np.asarray(expected)).max())


def write_weights(path: pathlib.Path, name: str = "nf_resnet", **data: Any) -> models.Network:
  """Writes the network as `launch.checkpoint export` does, for ten classes named "class 0" and so on; returns it."""
  network, size = make(name)
  model, overrides, _ = NETWORKS[name]
  config = Config(
    model=ModelConfig(name=model, overrides=overrides), data=DataConfig(name="digits", test_image_size=size, **data)
  )
  facts = {"config": dataclasses.asdict(config), "num_classes": 10, "class_names": [f"class {label}" for label in range(10)]}
  leaves = named_leaves(nnx.state(network, nnx.Any(nnx.Param, nnx.BatchStat)))
  arrays = {name: np.asarray(leaf) for name, leaf, _ in leaves}
  metadata = {"format": "nfnets", **{name: json.dumps(fact) for name, fact in facts.items()}}
  safetensors.numpy.save_file(arrays, path, metadata)
  return network
