"""NFNet with AGC on scikit-learn's handwritten digits: real scans, 8×8 pixels, that ship in the wheel.

    python -m launch.train --config=configs/digits.py --workdir=runs/digits
"""
from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config(arg: str = "") -> Config:
  if arg:
    raise ValueError(f"configs/digits.py takes no argument, got {arg!r}")
  return Config(
      model=ModelConfig(name="nfnet_tiny", drop_rate=0.2, overrides={"stem_strides": (1, 1, 1, 1), "stage_strides": (1, 2, 2, 1)}),
      data=DataConfig(name="digits", shift=1, mean=(77.8,) * 3, std=(95.9,) * 3),
      optim=OptimConfig(base_lr=0.1, warmup_epochs=3, clipping=0.01, agc_track=True, ema_decay=0.99),
      batch=128, eval_batch=360, epochs=60, label_smoothing=0.1, log_every=22, eval_every=10, checkpoint_every=20)
