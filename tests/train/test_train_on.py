"""Training on from trained weights: layers that are frozen stay as they came, through checkpoints and resumes too."""

import dataclasses

import numpy as np

from nfnets.config import Config, DataConfig, InitConfig, ModelConfig, OptimConfig
from nfnets.train import loop
from nfnets.train.initial import read_weights

MODEL = ModelConfig(name="nf_resnet_tiny", overrides={"width": (16, 16), "depth": (1, 1), "stage_strides": (1, 2)})
OPTIM = OptimConfig(base_lr=0.4, warmup_epochs=0.25, ema_decay=0.9)
BASE = Config(model=MODEL, data=DataConfig(name="digits"), optim=OPTIM, batch=128, eval_batch=360, epochs=1)


def test_frozen_layers_keep_their_bits_through_a_resume(tmp_path):
  first, second = str(tmp_path / "first"), str(tmp_path / "second")
  loop.train(BASE, first)
  # with SAM, whose ascent must leave them where they are too
  optim = dataclasses.replace(OPTIM, frozen=("^stem/", "^blocks/0/"), layer_decay=0.5, weight_decay=0.1, sam_rho=0.05)
  config = dataclasses.replace(BASE, optim=optim, init=InitConfig(weights=first, new_head=True), seed=1)
  loop.train(config, second)
  loop.train(dataclasses.replace(config, epochs=2), second)
  source = read_weights(first).arrays
  frozen = {name for name in source if name.startswith(("stem/", "blocks/0/"))}
  for weights in ("params", "ema"):
    after = read_weights(second, weights=weights).arrays
    for name in frozen:
      np.testing.assert_allclose(after[name], source[name], rtol=0 if weights == "params" else 1e-6, err_msg=name)
    assert all(not np.array_equal(after[name], source[name]) for name in source if name not in frozen)
