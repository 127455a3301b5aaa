"""NFNet-F0 … F7 and F0+ … F7+ on ImageNet with AGC, as published (2102.06171, section 4 and appendix A).

    python -m launch.train --config=configs/nfnet.py:F0 --config.data.dir=DATA --workdir=runs/nfnet-f0

A step has 4,096 images, for which F0 needs 128 TPUv3 cores or 64 GPUs of 80 GB, for example; `--config.model.remat` and a smaller
`--config.batch` need less (the learning rate follows the batch). The argument is the variant, and after it may stand `minival`,
which trains without the 10,000 images of train[:10000] and evaluates on them. DATA holds imagenet2012 as TFDS prepares it, in
TFRecords. This recipe has not been run to its end yet. Published top-1: F0 83.6, F1 84.7, F2 85.1, F3 85.7, F4 85.9, F5 86.0 %.
"""

from configs import imagenet
from nfnets.config import Config, ModelConfig, OptimConfig

VARIANTS = tuple(f"F{level}{plus}" for plus in ("", "+") for level in range(8))


def get_config(arg: str = "F0") -> Config:
  """Makes the configuration of `arg`, "VARIANT[,minival]"; raises UserError for another one."""
  variant, minival, _ = imagenet.parse(
    arg, VARIANTS, "configs/nfnet.py takes F0 to F7 or F0+ to F7+, and minival, e.g. F0,minival"
  )
  return Config(
    # Dropout, image sizes and RandAugment follow from the variant (nfnets/train/resolve.py).
    model=ModelConfig(name=f"nfnet_{variant.lower()}", dtype="bfloat16"),
    data=imagenet.data_config(minival=minival, test_crop="squash", mix="mixup_cutmix", augment="randaugment"),
    optim=OptimConfig(base_lr=0.1, warmup_epochs=5, weight_decay=2e-5, clipping=0.01, ema_decay=0.99999),
    batch=4096,
    eval_batch=2048,
    epochs=360,
    label_smoothing=0.1,
  )
