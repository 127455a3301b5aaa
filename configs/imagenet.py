"""What the ImageNet recipes of this directory share; it is no recipe itself."""

from typing import Any

from nfnets.config import DataConfig
from nfnets.errors import UserError


def parse(arg: str, variants: tuple[str, ...], expected: str, *, sizes: bool = False) -> tuple[str, bool, int | None]:
  """Reads "VARIANT[,bs=N][,minival]".

  Args:
    arg: the recipe's argument.
    variants: the values that VARIANT may have.
    expected: the beginning of the error's message, such as "configs/resnet.py takes a depth of 50".
    sizes: whether `bs=N` may be given.

  Returns:
    (the variant, whether `minival` was given, N or None).

  Raises:
    UserError: `arg` has another form.
  """
  variant, *options = arg.split(",")
  batches = [option.removeprefix("bs=") for option in options if sizes and option.startswith("bs=")]
  unknown = [option for option in options if option != "minival" and not (sizes and option.startswith("bs="))]
  if variant not in variants or unknown or len(batches) > 1 or not all(batch.isdecimal() and int(batch) for batch in batches):
    raise UserError(f"{expected}; got {arg!r}")
  return variant, "minival" in options, int(batches[0]) if batches else None


def data_config(*, minival: bool, **fields: Any) -> DataConfig:
  """Makes the configuration of TFDS's ImageNet, cropped and mirrored.

  Args:
    minival: whether to train without train[:10000] and to evaluate on it, instead of on the validation split.
    fields: of `DataConfig`, set beside or instead of these.
  """
  train, test = ("train[10000:]", "train[:10000]") if minival else ("train", "validation")
  settings: dict[str, Any] = {"train_crop": "inception", "test_crop": "crop", "flip": True, **fields}
  return DataConfig(name="imagenet2012", train_split=train, test_split=test, **settings)
