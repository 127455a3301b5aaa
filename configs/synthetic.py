"""The NFNet recipe on noise, for measuring: any model, at its own training resolution, with AGC and EMA as published.

    python -m launch.bench step --config=configs/synthetic.py:nfnet_f0 --without-agc

The argument is the model's name. A step has 32 images, as in the published times of one device (2102.06171); launch.bench's
`--batch` sets another number, that of all devices together.
"""

from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config(arg: str = "nfnet_f0") -> Config:
  """Makes the configuration of the model named `arg`."""
  return Config(
    model=ModelConfig(name=arg or "nfnet_f0", dtype="bfloat16"),
    data=DataConfig(name="synthetic"),
    optim=OptimConfig(name="sgd", base_lr=0.1, warmup_epochs=5, weight_decay=2e-5, clipping=0.01, ema_decay=0.99999),
    batch=32,
    epochs=360,
    label_smoothing=0.1,
  )
