"""NF-ResNets on ImageNet with AGC at any batch size (2101.08692; 2102.06171, section 4.1).

    python -m launch.train --config=configs/nf_resnet.py:50,bs=1024 --config.data.dir=DATA --workdir=runs/nf-resnet-50

The argument is the depth (50, 101, 152, 200, 288 or 600). After it may stand `bs=N`, N images a step (by default 1,024, which 8
GPUs of 80 GB hold), and `minival`, which trains without train[:10000] and evaluates on it. Set the batch by `bs=N` and not by
`--config.batch`: AGC's threshold follows it, 0.01 at 4,096 as published and twice that for each halving. The rule is ours; figure
2 of 2102.06171 shows that smaller batches bear larger thresholds. This recipe has not been run to its end yet.
"""

from configs import imagenet
from nfnets.config import Config, ModelConfig, OptimConfig

DEPTHS = ("50", "101", "152", "200", "288", "600")


def get_config(arg: str = "50") -> Config:
  """Makes the configuration of `arg`, "DEPTH[,bs=N][,minival]"; raises UserError for another one."""
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
