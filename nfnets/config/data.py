"""Which images, and what is done to them."""

import dataclasses
import math

from nfnets.config.checks import check_choice, check_number, invalid


@dataclasses.dataclass(slots=True, kw_only=True)
class DataConfig:
  """Which images, and what is done to them before the network sees them.

  None leaves a field to what it follows from: the data, or the row of the model's variant (see `nfnets.train.resolve`).
  """

  # "digits" (scikit-learn's, in the wheel), "synthetic", "folder" (a directory per class), or a prepared TFDS dataset.
  name: str = "digits"
  # Where TFDS datasets are prepared (a disk, gs://, s3://), or the image folder. Empty = ~/tensorflow_datasets.
  dir: str = ""
  # Where offset indices of TFRecord shards are kept (a bucket too); empty = $XDG_CACHE_HOME/nfnets or ~/.cache/nfnets.
  index_dir: str = ""
  # Split expressions of TFDS, such as "train[10000:]" or "train[:98%]".
  train_split: str = "train"
  test_split: str = "test"
  # Names of the image's and the label's feature.
  image_key: str = "image"
  label_key: str = "label"
  # Classes of the classifier; must be what the data has. None = as the data says.
  num_classes: int | None = None
  # Side of the square images, pixels, in training and in evaluation. None = as stored where images are not resized,
  # else the variant's.
  image_size: int | None = None
  test_image_size: int | None = None

  # Training images: "none" (as stored) or "inception" (a random part, resized; 1602.07261 and the official pipeline).
  train_crop: str = "none"
  # The part's share of the image's area (parts of less than 0.1 are drawn again, as published), and its width / height.
  crop_area: tuple[float, float] = (0.08, 1.0)
  crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
  # Evaluation images: "none"; "squash" to size + 32 and crop the centre (NFNets); "crop" the centre, size / (size + 32) of
  # the shorter side, and resize (ResNets); "short_side" resized to size / 0.875 and crop the centre.
  test_crop: str = "none"
  # Random shift by up to this many pixels each way (edges repeat), and mirroring of half the images.
  shift: int = 0
  flip: bool = False
  # "none", "mixup", "cutmix", or "mixup_cutmix": each on half the batch.
  mix: str = "none"
  # Parameter of mixup's Beta(a, a).
  mixup_alpha: float = 0.2
  # What an image is mixed with: its neighbour in the "batch", or a "second" batch, which doubles the decoding (official).
  mix_with: str = "batch"
  # "none", "randaugment" or "autoaugment" (policy v0); before mixing, or after it (NFNets).
  augment: str = "none"
  augment_before_mix: bool = False
  # RandAugment: operations one after the other, and their magnitude (0-30). None = the variant's.
  randaugment_layers: int | None = None
  randaugment_magnitude: float | None = None
  # Every image stands this many times in a batch, differently augmented (repeated augmentation, 2310.16764).
  repeats: int = 1

  # Threads that decode; None = one a core.
  threads: int | None = None
  # Records that lie together and are read together; their blocks are shuffled, then records among 16 blocks. None = 1 (a
  # full shuffle) on disks, 32 in buckets.
  shuffle_block: int | None = None
  # Training stops when more than this share of the dataset's records is found corrupt; fewer are replaced and counted.
  max_corrupt: float = 0.01
  # Per channel, on the scale 0-255; subtracted and divided by on the device. ImageNet's.
  mean: tuple[float, ...] = (123.675, 116.28, 103.53)
  std: tuple[float, ...] = (58.395, 57.12, 57.375)

  def validate(self) -> None:
    """Checks every field; raises UserError naming the field, the value got and what was expected."""
    for field, choices in _DATA_CHOICES.items():
      check_choice(field, getattr(self, field), choices, "DataConfig")
    for field in ("name", "train_split", "test_split", "image_key", "label_key"):
      if not isinstance(getattr(self, field), str) or not getattr(self, field):
        raise invalid(field, getattr(self, field), "a name", "DataConfig")
    for field, least in (
      ("num_classes", 1),
      ("image_size", 1),
      ("test_image_size", 1),
      ("shift", 0),
      ("repeats", 1),
      ("randaugment_layers", 1),
      ("threads", 1),
      ("shuffle_block", 1),
    ):
      value = getattr(self, field)
      if value is None and field not in ("shift", "repeats"):
        continue
      if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise invalid(field, value, f"a whole number >= {least}", "DataConfig")
    for field in ("flip", "augment_before_mix"):
      if not isinstance(getattr(self, field), bool):
        raise invalid(field, getattr(self, field), "True or False", "DataConfig")
    check_number("mixup_alpha", self.mixup_alpha, "a number > 0", lambda x: 0 < x < math.inf, "DataConfig")
    check_number("max_corrupt", self.max_corrupt, "a share in [0, 1]", lambda x: 0 <= x <= 1, "DataConfig")
    if self.randaugment_magnitude is not None:
      check_number(
        "randaugment_magnitude", self.randaugment_magnitude, "a number in [0, 30]", lambda x: 0 <= x <= 30, "DataConfig"
      )
    for field, most in (("crop_area", 1), ("crop_aspect", math.inf)):
      value = getattr(self, field)
      if len(value) != 2 or not 0 < value[0] <= value[1] <= most or most == 1 and value[1] < 0.1:
        raise invalid(field, value, f"two numbers, 0 < least <= most{', 0.1 <= most <= 1' if most == 1 else ''}", "DataConfig")
    for field in ("mean", "std"):
      value = getattr(self, field)
      if len(value) != 3 or not all(isinstance(v, (int, float)) for v in value) or field == "std" and min(value) <= 0:
        raise invalid(field, value, f"three numbers{' > 0' if field == 'std' else ''}", "DataConfig")


_DATA_CHOICES = {
  "train_crop": ("none", "inception"),
  "test_crop": ("none", "squash", "crop", "short_side"),
  "mix": ("none", "mixup", "cutmix", "mixup_cutmix"),
  "mix_with": ("batch", "second"),
  "augment": ("none", "randaugment", "autoaugment"),
}
