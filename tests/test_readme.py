"""README's code runs as it stands: a trained network is loaded, asked, and trained on."""

import pathlib
import re

import jax
import numpy as np
import optax
from flax import nnx

from nfnets import agc, predict
from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.train import loop

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = {"width": (16,), "depth": (1,), "stage_strides": (1,)}


def block(beginning: str) -> str:
  """The code block of README that holds `beginning`."""
  blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
  (only,) = [block for block in blocks if beginning in block]
  return only


def test_load_ask_and_train_on(tmp_path, monkeypatch):
  config = Config(
    model=ModelConfig(name="nf_resnet_tiny", overrides=TINY),
    data=DataConfig(name="digits"),
    optim=OptimConfig(base_lr=0.4, warmup_epochs=0.5),
    batch=256,
    epochs=1,
  )
  loop.train(config, str(tmp_path / "runs" / "digits"))
  from PIL import Image

  Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
  monkeypatch.chdir(tmp_path)
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
  names = {"images": images, "predict": predict, "agc": agc, "jax": jax, "nnx": nnx, "optax": optax}
  exec(block("from nfnets import predict"), names)
  assert names["classifier"].network.num_classes == 10
  code = block('predict.load("digits.safetensors"').replace('"digits.safetensors"', '"runs/digits"')
  exec(code, names)
  prepared = names["classifier"].prepare(images)
  value = []
  params, opt_state = names["params"], names["opt_state"]
  for step in range(10):
    params, opt_state, loss = names["step"](params, opt_state, prepared, np.arange(4), jax.random.key(step))
    value.append(float(loss))
  assert np.isfinite(value).all() and value[-1] < value[0]
