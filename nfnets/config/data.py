"""Which images, and what is done to them."""

import dataclasses
import math

from nfnets.config import checks


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
  # Split expressions of TFDS, as "train[10000:]" or "train[:98%]". A slice of a TFDS dataset is what TFDS makes of it; one of
  # an image folder has every class in proportion: it is taken from an order made of the SHA-256 of the files' names.
  train_split: str = "train"
  test_split: str = "test"
  # Share of an image folder without train/ and val/ that is for validation, at least an image of each class; 0 = none. An image
  # belongs to it by the SHA-256 of its CLASS/FILE, so that photographs that are added later move no others (but one that stood in
  # for a class that had none there).
  validation: float = 0.1
  # Names of the image's and the label's feature.
  image_key: str = "image"
  label_key: str = "label"
  # Classes of the classifier; must be what the data has. None = as the data says.
  num_classes: int | None = None
  # Side of the square images, pixels, in training and in evaluation. None = as stored where images are not resized; else the
  # variant's, and in evaluation that of training where it is given.
  image_size: int | None = None
  test_image_size: int | None = None

  # Training images: "none" (as stored) or "inception" (a random part, resized; 1602.07261 and the official pipeline), which
  # needs a test_crop or, where all images are stored with one size, that size as test_image_size.
  train_crop: str = "none"
  # The part's share of the image's area (parts of less than 0.1 are drawn again, as published), and its width / height.
  crop_area: tuple[float, float] = (0.08, 1.0)
  crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
  # Evaluation images: "none" (as stored); "squash" to size + 32 and crop the centre (NFNets); "crop" the centre, size /
  # (size + 32) of the shorter side, and resize (ResNets); "short_side" resized to size / 0.875 and crop the centre.
  test_crop: str = "none"
  # The square's share of what it is cut out of (timm's crop_pct); None = the shares above.
  test_crop_pct: float | None = None
  # How evaluation images are resized, always bicubic: as "tensorflow" does, without antialiasing, which DeepMind's figures were
  # measured with; or as "pillow" does, with it, as torchvision and timm.
  test_resize: str = "tensorflow"
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
  # Pillow's names of the image formats that are opened, whatever a file is called; no others, because Pillow would start
  # Ghostscript for an EPS. "AVIF", "JPEG2000" and "PPM" may be added.
  formats: tuple[str, ...] = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
  # An image of more pixels is a corrupt record. The largest of ImageNet that is reported has 61 million (9331×6530); one at
  # the limit takes 0.2 GB (baseline JPEG) to 1 GB (WebP) while it is decoded, in each of the threads that meets one.
  max_pixels: int = 1 << 26
  # Training stops when more than this share of the dataset's records is found corrupt; fewer are replaced and counted.
  max_corrupt: float = 0.01
  # Per channel, on the scale 0-255; subtracted and divided by on the device. ImageNet's.
  mean: tuple[float, ...] = (123.675, 116.28, 103.53)
  std: tuple[float, ...] = (58.395, 57.12, 57.375)

  def validate(self) -> None:
    """Checks every field; raises UserError naming the field, the value got and what was expected."""
    checks.validate(self, _RULES)


_RULES: dict[str, checks.Rule] = {
  "name": checks.name,
  "dir": checks.text,
  "index_dir": checks.text,
  "train_split": checks.name,
  "test_split": checks.name,
  "validation": checks.share("a share in [0, 1)"),
  "image_key": checks.name,
  "label_key": checks.name,
  "num_classes": checks.optional(checks.whole(1)),
  "image_size": checks.optional(checks.whole(1)),
  "test_image_size": checks.optional(checks.whole(1)),
  "train_crop": checks.choice("none", "inception"),
  "crop_area": checks.numbers(
    2, "two numbers, 0 < least <= most, 0.1 <= most <= 1", lambda least, most: 0 < least <= most <= 1 and most >= 0.1
  ),
  "crop_aspect": checks.numbers(2, "two numbers, 0 < least <= most", lambda least, most: 0 < least <= most < math.inf),
  "test_crop": checks.choice("none", "squash", "crop", "short_side"),
  "test_crop_pct": checks.optional(checks.number("a share in [0.05, 1]", lambda value: 0.05 <= value <= 1)),
  "test_resize": checks.choice("tensorflow", "pillow"),
  "shift": checks.whole(0),
  "flip": checks.flag,
  "mix": checks.choice("none", "mixup", "cutmix", "mixup_cutmix"),
  "mixup_alpha": checks.positive("a number > 0"),
  "mix_with": checks.choice("batch", "second"),
  "augment": checks.choice("none", "randaugment", "autoaugment"),
  "augment_before_mix": checks.flag,
  "randaugment_layers": checks.optional(checks.whole(1)),
  "randaugment_magnitude": checks.optional(checks.number("a number in [0, 30]", lambda value: 0 <= value <= 30)),
  "repeats": checks.whole(1),
  "threads": checks.optional(checks.whole(1)),
  "shuffle_block": checks.optional(checks.whole(1)),
  "formats": checks.names("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"),
  "max_pixels": checks.whole(1, 178_956_971),  # from there on Pillow refuses by itself
  "max_corrupt": checks.number("a share in [0, 1]", lambda value: 0 <= value <= 1),
  "mean": checks.numbers(3, "three numbers", lambda *values: all(map(math.isfinite, values))),
  "std": checks.numbers(3, "three numbers > 0", lambda *values: all(0 < value < math.inf for value in values)),
}
