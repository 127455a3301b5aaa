"""NF-RegNet-B0 … B5 on ImageNet, as in the official release: no AGC, mixup and cutmix (2101.08692, section 5).

    python -m launch.train --config=configs/nf_regnet.py:B0 --config.data.dir=DATA --workdir=runs/nf-regnet-b0

Arguments: the variant (B0 to B5), then `minival` (train without train[:10000], evaluate on it). 1,024 images a step, e.g. 8 GPUs.
Not yet run to its end here.
"""

from configs import imagenet
from nfnets.config import Config, ModelConfig, OptimConfig

VARIANTS = tuple(f"B{level}" for level in range(6))


def get_config(arg: str = "B0") -> Config:
  variant, minival, _ = imagenet.parse(arg, VARIANTS, "configs/nf_regnet.py takes B0 to B5, and minival, e.g. B0,minival")
  return Config(
    model=ModelConfig(name=f"nf_regnet_{variant.lower()}"),
    data=imagenet.data_config(minival=minival, mix="mixup_cutmix"),
    optim=OptimConfig(
      base_lr=0.4,
      scale_lr=False,
      end_lr=0.001,
      warmup_epochs=5,
      weight_decay=5e-5 + 1e-5 * int(variant[1]),
      clipping=None,
      ema_decay=0.99999,
    ),
    batch=1024,
    eval_batch=1024,
    epochs=360,
    label_smoothing=0.1,
  )
