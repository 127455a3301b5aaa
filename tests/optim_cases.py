"""Small parameter trees, gradients and runs that the optimizer's tests share."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from nfnets import optim
from nfnets.config import OptimConfig

# The size of a batch and the length of the training, as make_schedule and make_optimizer take them.
LENGTH = {"batch": 512, "steps_per_epoch": 2.5, "total_steps": 20}
SHAPES = {
  "stem/kernel": (3, 3, 3, 8),
  "stem/gain": (8,),
  "stem/bias": (8,),
  "blocks/0/conv1/kernel": (3, 3, 4, 8),
  "blocks/0/conv1/gain": (8,),
  "blocks/0/conv1/bias": (8,),
  "blocks/0/se/fc0/kernel": (8, 4),
  "blocks/0/se/fc0/bias": (4,),
  "blocks/0/skip_gain": (),
  "blocks/1/bias1a": (),
  "blocks/1/scale": (),
  "fc/kernel": (8, 5),
  "fc/bias": (5,),
}
CLASSIFIER = ("^fc/kernel$",)


def nest(flat):
  """{"a/b": leaf} → {"a": {"b": leaf}}."""
  tree = {}
  for path, value in flat.items():
    *parents, leaf = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree


def flatten(tree, convert=np.asarray):
  """{path: leaf} of any tree, each leaf converted."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): convert(leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


def random_flat(seed, scale=1.0):
  draw = np.random.default_rng(seed)
  return {path: np.asarray(draw.normal(scale=scale, size=shape), np.float32) for path, shape in SHAPES.items()}


def make_params(seed=0, scale=0.3):
  flat = random_flat(seed, scale)
  flat["blocks/0/skip_gain"] = np.float32(0)  # as networks initialise it: AGC's eps must let it move
  return jax.tree.map(jnp.asarray, nest(flat))


def make_grads(step):
  # Their scale is near the clipping threshold, so that some units are clipped and others are not.
  return jax.tree.map(jnp.asarray, nest(random_flat(100 + step, scale=0.006 * (step + 1))))


def make_state(params):
  """The same parameters as an nnx.State in which the classifier's kernel carries the model's mark."""
  leaves = {
    path: nnx.Param(jnp.asarray(value), **({"agc": False} if path == "fc/kernel" else {}))
    for path, value in flatten(params).items()
  }
  return nnx.State(nest(leaves))


def config_with(**fields):
  return OptimConfig(**{"agc_exclude": CLASSIFIER, "warmup_epochs": 1.0, **fields})


def run(optimizer, params, steps=4, wrap=lambda tree: tree, update=None):
  """Takes some steps, by default in a compiled update; `wrap` makes each step's gradients into a tree like `params`."""
  update = update or jax.jit(optimizer.update)
  state = optimizer.init(params)
  for step in range(steps):
    updates, state = update(wrap(make_grads(step)), state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def assert_close(got, want, rtol=2e-6, atol=1e-7):
  """Trees of different kinds, such as nnx.State and dict, are compared path by path."""
  chex.assert_trees_all_close(flatten(got), flatten(want), rtol=rtol, atol=atol)


def make(config, params, **kwargs):
  return optim.make_optimizer(config, params, **LENGTH, **kwargs)


def reference_lr(config, step, batch, steps_per_epoch, total_steps):
  """The published learning rate: a linear warm-up from 0, then half a cosine."""
  peak = config.base_lr * batch / 256 if config.scale_lr else config.base_lr
  warmup = config.warmup_epochs * steps_per_epoch
  if step <= warmup and warmup > 0:
    return peak * step / warmup
  progress = min((step - warmup) / (total_steps - warmup), 1)
  return config.end_lr + (peak - config.end_lr) * 0.5 * (1 + math.cos(math.pi * progress))
