"""What is said of a bad step: the layer, the checkpoint; and what is remembered of the steps that a rollback takes back."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from nfnets import optim
from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.train import recovery
from nfnets.train.run import Run
from nfnets.train.step import sharding, state as states

NAMES = ["stem/conv0", "stem", "blocks/0/conv0", "blocks/0/residual", "blocks/0", "blocks/1/conv0", "blocks/1", "pool", "logits"]


def flags(bad: tuple[str, ...]) -> nnx.State:
  """Parameters of a network with squeeze and excite; whether each is finite."""
  paths = ["stem/conv0/kernel", "fc/kernel", "fc/bias"]
  paths += [f"blocks/{i}/{layer}" for i in range(2) for layer in ("conv0/kernel", "se/fc0/kernel", "skip_gain")]
  tree: dict = {}
  for path in paths:
    *parents, last = path.split("/")
    branch = tree
    for parent in parents:
      branch = branch.setdefault(int(parent) if parent.isdecimal() else parent, {})
    branch[last] = nnx.Param(np.bool_(path not in bad))
  return nnx.State(tree)


@pytest.mark.parametrize(
  ("bad", "first"),
  [
    (("blocks/0/se/fc0/kernel", "stem/conv0/kernel"), "blocks/0/se/fc0/kernel"),
    (("blocks/1/conv0/kernel", "blocks/0/se/fc0/kernel", "stem/conv0/kernel"), "blocks/1/conv0/kernel"),
    (("fc/kernel", "blocks/1/se/fc0/kernel", "blocks/1/conv0/kernel"), "fc/kernel"),
    (("blocks/1/skip_gain", "blocks/1/conv0/kernel"), "blocks/1/skip_gain"),
  ],
)
def test_the_first_layer_of_the_backward_pass_is_named(bad, first):
  """Squeeze and excite, the gains and the classifier have no output of their own among the names, but have a place."""
  line = recovery._describe(NAMES, 1.0, [True] * len(NAMES), flags(bad), flags(()))
  assert f"first layer whose gradient is not: {first}, of {len(bad)}" in line


def test_with_sam_the_weights_that_it_ascends_to_are_looked_at():
  """An ascent that is far too long: activations are not finite there, though they are at the weights themselves."""
  config = Config(
    model=ModelConfig(name="nf_resnet_tiny", overrides={"width": (16,), "depth": (1,), "stage_strides": (1,)}),
    data=DataConfig(name="digits"),
    optim=OptimConfig(sam_rho=1e38, sam_share=1.0, clipping=None),
    batch=4,
  )
  graph, params, stats = states.split_network(states.build_network(config.model, 10))
  optimizer = optim.make_optimizer(config.optim, params, batch=4, steps_per_epoch=2, total_steps=40)
  state = states.init_state(params, stats, optimizer, config)
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
  batch = {"image": images, "label": np.arange(4, dtype=np.int32)}
  assert "first layer whose" in recovery.first_nonfinite(config, graph, state, lambda: batch)
  config.optim.sam_rho = 0.0
  assert "gradients or parameters are too large" in recovery.first_nonfinite(config, graph, state, lambda: batch)


def test_a_corrupt_record_whose_batch_was_dropped_by_a_rollback_is_told_again():
  mesh = sharding.make_mesh(jax.devices()[:1])
  run = SimpleNamespace(mesh=mesh, stop=False, batches=SimpleNamespace(corrupt={3: "", 17: ""}), corrupt=set(), told=set())
  send = lambda: int(Run._send(run, {"image": np.zeros((1, 2, 2, 3), np.uint8)})["corrupt"][0])
  assert {send(), send()} == {4, 18} and send() == 0
  run.corrupt = {3}  # the step with the other one was never taken
  run.told = set(run.corrupt)
  assert send() == 18 and send() == 0
