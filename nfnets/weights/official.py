"""Runs the release's own network in a process of its own: python official.py DIR REQUEST.npz ANSWER.npz

DIR is the folder that holds the release's package, which is called nfnets as ours is; so this file imports nothing of ours, and
is run by its path. It needs dm-haiku. The request holds "images" float32 [B, H, W, 3], "spec" (JSON: the class, its module and
its arguments) and the arrays by Haiku's flat names; the answer holds the class's outputs, with its metrics of every block.
"""

import importlib
import json
import os
import sys
import types
from typing import Any

import numpy as np


def find_release(directory: str) -> None:
  """Makes `nfnets` the release's package, which has no __init__.py and so would come after any other of that name."""
  import jax

  sys.path.insert(0, directory)
  package = types.ModuleType("nfnets")
  package.__path__ = [os.path.join(directory, "nfnets")]
  sys.modules["nfnets"] = package
  if not hasattr(jax, "tree_map"):  # the release was written for a JAX that had it
    setattr(jax, "tree_map", jax.tree.map)  # noqa: B010 (pyrefly knows of no such attribute)


def main(directory: str, request: str, answer: str) -> None:
  sys.path.pop(0)  # this file's own folder, whose haiku.py is another
  import haiku as hk  # pyrefly: ignore
  import jax

  find_release(directory)
  given = dict(np.load(request))
  spec = json.loads(str(given.pop("spec")))
  images = given.pop("images")
  network = getattr(importlib.import_module(f"nfnets.{spec['module']}"), spec["class"])

  def forward(x, is_training=False):
    return network(**spec["arguments"])(x, is_training=is_training, return_metrics=True)

  model = hk.transform_with_state(forward)
  shapes = jax.eval_shape(lambda key, x: model.init(key, x, is_training=True), jax.random.key(0), images)
  used: set[str] = set()

  def fill(module: str, name: str, like: jax.ShapeDtypeStruct) -> np.ndarray:
    flat = f"{module}/{name}"
    used.add(flat)
    # Of a moving average, `hidden` and `counter` are for going on with a training; an evaluation does not read them.
    return given[flat].reshape(like.shape) if flat in given else np.zeros(like.shape, like.dtype)

  fill_all = lambda tree: {module: {name: fill(module, name, leaf) for name, leaf in tree[module].items()} for module in tree}
  params, state = map(fill_all, shapes)
  missing = [f"{module}/{name}" for module, leaves in params.items() for name in leaves if f"{module}/{name}" not in given]
  if missing or given.keys() - used:
    raise SystemExit(f"the release's network has other arrays, such as {sorted(missing or given.keys() - used)[:3]}")
  outputs, _ = jax.jit(model.apply)(params, state, None, images)
  arrays: dict[str, Any] = {name: np.asarray(value) for name, value in outputs.items()}
  np.savez(answer, **arrays)


if __name__ == "__main__":
  main(*sys.argv[1:])
