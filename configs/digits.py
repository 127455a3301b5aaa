"""NFNet with AGC on scikit-learn's handwritten digits: 1,797 real scans of 8×8 pixels that are part of the package.

    python -m launch.train --config=configs/digits.py --workdir=runs/digits

This is the published recipe (AGC, Nesterov, warm-up and cosine, label smoothing, mixup, EMA) on a small NFNet that halves its
images less often. Digits fill their 8×8 pixels, so that they are not shifted.
"""

from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.errors import UserError


def get_config(arg: str = "") -> Config:
  """Makes the configuration; raises UserError for any argument."""
  if arg:
    raise UserError(f"configs/digits.py takes no argument, got {arg!r}")
  return Config(
    model=ModelConfig(name="nfnet_digits"),
    data=DataConfig(name="digits", mix="mixup", mean=(77.8,) * 3, std=(95.9,) * 3),
    optim=OptimConfig(base_lr=0.4, warmup_epochs=3, clipping=0.04, agc_track=True, ema_decay=0.99),
    batch=128,
    eval_batch=360,
    epochs=30,
    log_every=20,
    eval_every=5,
    checkpoint_every=15,
  )
