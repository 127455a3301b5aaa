"""NF-ResNets on ImageNet with AGC at any batch size (2101.08692; 2102.06171, section 4.1).

    python -m launch.train --config=configs/nf_resnet.py:50,bs=1024 --config.data.dir=DATA --workdir=runs/nf-resnet-50

Arguments: the depth (50, 101, 152, 200, 288, 600), then `bs=` images a step (1024) and `minival` (train without
train[:10000], evaluate on it). Give the batch as `bs=`: AGC's threshold follows it, 0.01 at 4,096 as published and twice that for
each halving (ours: larger thresholds do at smaller batches, figure 2 of 2102.06171). 8 GPUs of 80 GB hold 1,024 images.
Not yet run to its end here.
"""

from configs import imagenet
from nfnets.config import Config, ModelConfig, OptimConfig

DEPTHS = ("50", "101", "152", "200", "288", "600")


def get_config(arg: str = "50") -> Config:
  depth, minival, batch = imagenet.parse(
    arg, DEPTHS, f"configs/nf_resnet.py takes a depth of {', '.join(DEPTHS)}, bs=N and minival, e.g. 50,bs=1024", sizes=True
  )
  batch = batch or 1024
  return Config(
    model=ModelConfig(name=f"nf_resnet{depth}", dtype="bfloat16"),
    data=imagenet.data_config(minival=minival),
    optim=OptimConfig(base_lr=0.1, warmup_epochs=5, weight_decay=5e-5, clipping=0.01 * 4096 / batch, ema_decay=0.9999),
    batch=batch,
    eval_batch=1024,
    epochs=90,
    label_smoothing=0.1,
  )
