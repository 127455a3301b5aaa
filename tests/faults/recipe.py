"""The recipe of a run of seconds to make faults in: 22 steps of two blocks on the handwritten digits, a batch in two parts."""

from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig

SMALL = {
  "width": (16, 16),
  "group_width": 8,
  "stem_width": (4, 4, 8),
  "stem_strides": (1, 1, 1, 2),
  "stage_strides": (1, 2),
  "depth": (1, 1),
}


def get_config(arg: str = "") -> Config:
  """Makes the run's configuration. arg: how many epochs, of 11 steps each; 2 unless given."""
  return Config(
    model=ModelConfig(name="nfnet_tiny", drop_rate=0.2, stochastic_depth=0.2, overrides=dict(SMALL)),
    data=DataConfig(name="digits", shift=1),
    optim=OptimConfig(base_lr=0.4, warmup_epochs=0.5, clipping=0.05, agc_track=True, ema_decay=0.9),
    batch=128,
    accumulate=2,
    eval_batch=360,
    epochs=float(arg or 2),
    log_every=2,
    eval_every=1,
    checkpoint_every=0.36,
    watchdog=60,
  )
