"""NF-RegNet-B0 … B5 on ImageNet, as in the official release, without AGC and with mixup and cutmix (2101.08692, section 5).

    python -m launch.train --config=configs/nf_regnet.py:B0 --config.data.dir=DATA --workdir=runs/nf-regnet-b0

The argument is the variant (B0 to B5), and after it may stand `minival`, which trains without train[:10000] and evaluates on it.
A step has 1,024 images, for which 8 GPUs do. This recipe has not been run to its end yet.
"""

from configs import imagenet
from nfnets.config import Config, ModelConfig, OptimConfig

VARIANTS = tuple(f"B{level}" for level in range(6))


def get_config(arg: str = "B0") -> Config:
  """Makes the configuration of `arg`, "VARIANT[,minival]"; raises UserError for another one."""
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
