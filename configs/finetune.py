"""Trains a network on from trained weights on images of one's own: a new classifier, layer-wise learning rates, SAM, EMA.

    python -m launch.train --config=configs/finetune.py:nfnet_f0,weights=runs/f0 --config.data.dir=PHOTOS --workdir=runs/photos

PHOTOS holds train/CLASS/ and val/CLASS/; `--config.data.name=NAME` takes a prepared TFDS dataset instead. The argument is a
network of nfnets.models; after it may stand `weights=` (a file that `launch.checkpoint export` wrote, a workdir, or
WORKDIR/checkpoints/STEP) and `epochs=N`. Without weights the network begins from its seed, with all layers at one rate: the same
budget from scratch.

Set what must be as it was for the weights: `--config.data.mean` and `std`, and `--config.model.overrides`. Another resolution is
`--config.data.image_size`. Parts stay as they are by `--config.optim.frozen="('^stem/', '^blocks/[0-3]/')"`.

The papers fine-tune for 15,000 steps of 2,048 images at a learning rate of 0.1 with weight decay 1e-5, SAM and EMA (2102.06171,
2310.16764). A small dataset gives only some hundred steps: here a batch is 64 images and the rate stays 0.1 instead of falling
with the batch, AGC's threshold is that of small batches, and the average is a short one. The layer-wise rates are ours.

On two CPU cores, a small NF-ResNet in a minute or two (2026-11-24, docs/finetune.md): 92.4 % on digits from CIFAR-10's weights
against 29.5 % from scratch in 90 steps, 36.1 against 23.5 % on CIFAR-10 from 1 % of its labels and 45.5 against 28.2 % from 10 %,
both from Fashion-MNIST's weights. On larger networks and on GPUs it has not been run yet.
"""

from nfnets import models
from nfnets.config import Config, DataConfig, InitConfig, ModelConfig, OptimConfig
from nfnets.errors import UserError

EXPECTED = "configs/finetune.py takes a network of nfnets.models, weights=SOURCE and epochs=N, e.g. nfnet_f0,weights=runs/f0"


def get_config(arg: str = "") -> Config:
  """Makes the configuration of `arg`, "MODEL[,weights=SOURCE][,epochs=N]"; raises UserError for another one."""
  name, *pairs = arg.split(",")
  given = [(key, value) for key, _, value in (pair.partition("=") for pair in pairs)]
  options = {"weights": "", "epochs": "20", **dict(given)}
  understood = all(key in ("weights", "epochs") and value for key, value in given) and len(dict(given)) == len(given)
  if name not in models.names() or not understood or not options["epochs"].isdecimal() or int(options["epochs"]) == 0:
    raise UserError(f"{EXPECTED}; got {arg!r}")
  trained = bool(options["weights"])
  return Config(
    model=ModelConfig(name=name),
    data=DataConfig(name="folder", train_crop="inception", crop_area=(0.25, 1.0), test_crop="crop", flip=True),
    optim=OptimConfig(
      base_lr=0.1,
      scale_lr=False,
      warmup_epochs=0.5,
      weight_decay=1e-5,
      layer_decay=0.75 if trained else 1.0,
      clipping=0.08,
      sam_rho=0.05,
      ema_decay=0.99,
    ),
    init=InitConfig(weights=options["weights"], new_head=trained),
    batch=64,
    eval_batch=256,
    epochs=int(options["epochs"]),
    keep_best="ema_top1",
    log_every=20,
  )
