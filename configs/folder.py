"""An NF-ResNet or NFNet on one's own photographs: a folder for each class, with images of any size in it, and nothing else.

    python -m launch.train --config=configs/folder.py --config.data.dir=PHOTOS --workdir=runs/photos

The argument is the model, nf_resnet26 by default, and after it may stand `epochs=N` and `bs=N`, e.g. nfnet_l0,epochs=100,bs=64. A
tenth of each class is for validation unless PHOTOS holds train/ and val/. A step has 32 images, so that a few hundred photographs
do; with tens of thousands, take bs=256 (the learning rate follows). On a GPU, `--config.model.dtype=bfloat16` saves memory;
without one, take a small network on small images: `configs/folder.py:nfnet_tiny` and `--config.data.image_size=64`.

Last run, 2026-11-24, nfnet_tiny,epochs=6 at 64 px, on 2 CPU cores with other work on them: 90.4 % of 104 validation images after
7 minutes, on 1,200 JPEGs cut from 11 photographs, a class each (two are the views of a stereo pair). Photographs of one's own are
harder. At its default this recipe has not been run to its end yet, and never on a GPU.
"""

from nfnets import models
from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.errors import UserError

FAMILIES = ("nf_resnet", "nf_seresnet", "nf_ecaresnet", "nfnet", "eca_nfnet")


def get_config(arg: str = "nf_resnet26") -> Config:
  """Makes the configuration of `arg`, "MODEL[,epochs=N][,bs=N]"; raises UserError for another one."""
  variants = tuple(name for name in models.names() if name.startswith(FAMILIES))
  model, *options = arg.split(",")
  numbers = {"epochs": 60, "bs": 32}
  given = [option.partition("=") for option in options]
  if (
    model not in variants
    or len({key for key, _, _ in given}) < len(given)
    or not all(key in numbers and value.isdecimal() and int(value) for key, _, value in given)
  ):
    raise UserError(
      f"configs/folder.py takes a model ({', '.join(variants)}), epochs=N and bs=N, e.g. nf_resnet26,epochs=60,bs=32; got {arg!r}"
    )
  numbers |= {key: int(value) for key, _, value in given}
  return Config(
    model=ModelConfig(name=model),
    data=DataConfig(name="folder", test_split="validation", train_crop="inception", test_crop="crop", flip=True),
    # AGC's threshold is between configs/cifar10.py's and what configs/nf_resnet.py's rule has at 256: no search was made for it.
    optim=OptimConfig(
      base_lr=0.4, warmup_epochs=numbers["epochs"] / 10, weight_decay=5e-5, clipping=0.08, agc_track=True, ema_decay=0.99
    ),
    batch=numbers["bs"],
    eval_batch=64,
    epochs=numbers["epochs"],
    label_smoothing=0.1,
    log_every=20,
    eval_every=5,
    checkpoint_every=5,
  )
