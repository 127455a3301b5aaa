"""NF-ResNet with AGC on CIFAR-10, and the BatchNorm ResNet of the same shape under the same recipe.

    tfds build cifar10 --file_format=array_record --data_dir=DATA      # once; needs tensorflow and the internet
    python -m launch.train --config=configs/cifar10.py --config.data.dir=DATA --workdir=runs/cifar10
    python -m launch.train --config=configs/cifar10.py:norm=batch --config.data.dir=DATA --workdir=runs/cifar10-batch

The argument is `norm=none` (NF-ResNet with AGC, the default) or `norm=batch`. Everything but the network and AGC is equal: batch,
schedule, weight decay, augmentation, EMA.
"""

from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.errors import UserError

NETWORKS = {"none": "nf_resnet_tiny", "batch": "resnet_tiny"}


def get_config(arg: str = "norm=none") -> Config:
  """Makes the configuration of `arg`, "norm=none" or "norm=batch"; raises UserError for another one."""
  key, _, norm = arg.partition("=")
  if key != "norm" or norm not in NETWORKS:
    raise UserError(f"configs/cifar10.py takes norm=none or norm=batch, got {arg!r}")
  return Config(
    model=ModelConfig(name=NETWORKS[norm]),
    data=DataConfig(name="cifar10", num_classes=10, shift=4, flip=True, mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7)),
    optim=OptimConfig(
      base_lr=0.1,
      warmup_epochs=2,
      weight_decay=5e-4,
      clipping=0.05 if norm == "none" else None,
      agc_track=norm == "none",
      ema_decay=0.999,
    ),
    batch=256,
    eval_batch=1000,
    epochs=20,
    label_smoothing=0.1,
    log_every=20,
    eval_every=1,
    checkpoint_every=2,
  )
