"""ResNet with BatchNorm on ImageNet: the baseline, under the official release's recipe.

    python -m launch.train --config=configs/resnet.py:50 --config.data.dir=DATA --workdir=runs/resnet-50

The argument is the depth, and after it may stand `minival`, which trains without train[:10000] and evaluates on it. A step has
1,024 images, for which 8 GPUs do. This recipe has not been run to its end yet.
"""

from configs import imagenet
from nfnets import models
from nfnets.config import Config, ModelConfig, OptimConfig


def get_config(arg: str = "50") -> Config:
  """Makes the configuration of `arg`, "DEPTH[,minival]"; raises UserError for another one."""
  depths = tuple(name.removeprefix("resnet") for name in models.names() if name.removeprefix("resnet").isdecimal())
  depth, minival, _ = imagenet.parse(
    arg, depths, f"configs/resnet.py takes a depth of {', '.join(depths)}, and minival, e.g. 50,minival"
  )
  return Config(
    model=ModelConfig(name=f"resnet{depth}"),
    data=imagenet.data_config(minival=minival),
    optim=OptimConfig(base_lr=0.1, warmup_epochs=5, weight_decay=1e-4, clipping=None, ema_decay=None),
    batch=1024,
    eval_batch=1024,
    epochs=90,
    label_smoothing=0.1,
  )
