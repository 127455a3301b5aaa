"""Training on from trained weights: layers that are frozen stay as they came, through checkpoints and resumes too."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from configs import finetune
from nfnets import optim
from nfnets.config import Config, DataConfig, InitConfig, ModelConfig, OptimConfig
from nfnets.train import loop
from nfnets.train.initial import initial_network, read_weights
from nfnets.train.step.state import build_network, init_state, split_network
from nfnets.train.step.step import make_train_step

pytestmark = pytest.mark.usefixtures("two_devices")
MODEL = ModelConfig(name="nf_resnet_tiny", overrides={"width": (16, 16), "depth": (1, 1), "stage_strides": (1, 2)})
OPTIM = OptimConfig(base_lr=0.4, warmup_epochs=0.25, ema_decay=0.9)
BASE = Config(model=MODEL, data=DataConfig(name="digits"), optim=OPTIM, batch=128, eval_batch=360, epochs=1)


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> str:
  """The workdir of a finished run of BASE."""
  workdir = str(tmp_path_factory.mktemp("first"))
  loop.train(BASE, workdir)
  return workdir


def test_frozen_layers_keep_their_bits_through_a_resume(first, tmp_path):
  second = str(tmp_path / "second")
  # with SAM, whose ascent must leave them where they are too
  slower = dataclasses.replace(OPTIM, frozen=("^stem/", "^blocks/0/"), layer_decay=0.5, weight_decay=0.1, sam_rho=0.05)
  config = dataclasses.replace(BASE, optim=slower, init=InitConfig(weights=first, new_head=True), seed=1)
  loop.train(config, second)
  loop.train(dataclasses.replace(config, epochs=2), second)
  source = read_weights(first).arrays
  frozen = {name for name in source if name.startswith(("stem/", "blocks/0/"))}
  for weights in ("params", "ema"):
    after = read_weights(second, weights=weights).arrays
    for name in frozen:
      np.testing.assert_allclose(after[name], source[name], rtol=0 if weights == "params" else 1e-6, err_msg=name)
    assert all(not np.array_equal(after[name], source[name]) for name in source if name not in frozen)


def test_the_recipe_trains_a_new_classifier_on_a_folder_of_photographs(first, tmp_path):
  """As a person would: weights of one dataset, images of another in a folder, two classes that a colour tells apart."""
  rng = np.random.default_rng(0)
  for split, count in (("train", 32), ("val", 8)):
    for name, channel in (("red", 0), ("blue", 2)):
      (tmp_path / "photos" / split / name).mkdir(parents=True)
      for number in range(count):
        pixels = rng.integers(0, 100, (40, 48, 3), np.uint8)
        pixels[..., channel] += 120
        Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{number}.png")
  config = finetune.get_config(f"nf_resnet_tiny,weights={first},epochs=6")
  data = dataclasses.replace(config.data, dir=str(tmp_path / "photos"), image_size=32)
  config = dataclasses.replace(config, model=MODEL, data=data, batch=16, eval_batch=16, eval_every=6)
  result = loop.train(config, str(tmp_path / "second"))
  assert result.results["params"]["top1"] == 1.0
  assert read_weights(tmp_path / "second").class_names == ("blue", "red")


def test_images_on_another_scale_than_the_weights_were_trained_on_are_said(first):
  said = []
  same = dataclasses.replace(BASE, init=InitConfig(weights=first))
  initial_network(same, 10, said.append)
  assert len(said) == 1 and "begins with the weights" in said[0]
  initial_network(dataclasses.replace(same, data=DataConfig(name="digits", std=(1.0, 2.0, 3.0))), 10, said.append)
  assert (
    "this run has mean (123.675, 116.28, 103.53) and std (1.0, 2.0, 3.0): set config.data.mean and config.data.std" in said[-1]
  )


def test_what_is_frozen_costs_no_backward_pass_and_no_moments():
  """Counted by XLA in the compiled step: a backward pass is two thirds of its operations."""

  def cost(frozen):
    config = dataclasses.replace(BASE, batch=8, optim=dataclasses.replace(OPTIM, frozen=frozen))
    graph, params, stats = split_network(nnx.eval_shape(lambda: build_network(config.model, 10)))
    optimizer = optim.make_optimizer(config.optim, params, batch=8, steps_per_epoch=10, total_steps=100)
    state = jax.eval_shape(lambda params, stats: init_state(params, stats, optimizer, config), params, stats)
    batch = {"image": jax.ShapeDtypeStruct((8, 32, 32, 3), np.uint8), "label": jax.ShapeDtypeStruct((8,), np.int32)}
    compiled = jax.jit(make_train_step(config, graph, optimizer)).lower(state, batch).compile()
    return compiled.cost_analysis()["flops"], sum(x.size for x in jax.tree.leaves(state.opt_state))

  (all_flops, _), (head_flops, head_numbers) = cost(()), cost(("^(?!fc/)",))
  assert head_flops < 0.4 * all_flops
  assert head_numbers == 16 * 10 + 10 + 1  # the classifier's momentum, and the count of updates
