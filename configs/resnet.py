"""ResNet with BatchNorm on ImageNet: the baseline, under the official release's recipe.

    python -m launch.train --config=configs/resnet.py:50 --config.data.dir=DATA --workdir=runs/resnet-50

Arguments: the depth, then `minival` (train without train[:10000], evaluate on it). 1,024 images a step, e.g. 8 GPUs.
Not yet run to its end here.
"""

from configs import imagenet
from nfnets import models
from nfnets.config import Config, ModelConfig, OptimConfig


def get_config(arg: str = "50") -> Config:
  depths = tuple(name.removeprefix("resnet") for name in models.names() if name.removeprefix("resnet").isdigit())
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
