"""Builds the two tf.data pipelines that this library's data path is measured against, over the same TFRecords.

TensorFlow is imported only when one of them is built. `tuned` does the least that can be asked of tf.data: it decodes and crops
in one operation, resizes, flips, and makes uint8 batches. `official` has the structure of the published NFNet pipeline
(deepmind-research nfnets/dataset.py and autoaugment.py): it reads twice the images, mixes them in float32 in a batch, takes the
batch apart, applies RandAugment by TensorFlow's operations, normalises, and puts the batch together again. Both are given what
helps them: parsing, cropping and decoding in one step, TensorFlow's faster inexact DCT, private threads, and no fixed order.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

from nfnets.config import DataConfig
from nfnets.data.errors import DataError

GREY = 128  # the value of the pixels that RandAugment's operations leave empty


def missing() -> bool:
  """Says whether TensorFlow is missing, without importing it."""
  return importlib.util.find_spec("tensorflow") is None


def preload() -> dict[str, str]:
  """Imports what the pipelines need; returns the versions of the packages that do the work."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  return {"tensorflow": tf.__version__, "tensorflow-datasets": tfds.__version__}


def check(config: DataConfig) -> None:
  """Raises DataError unless `config` names a TFDS dataset of TFRecord shards on a disk."""
  if config.name in ("digits", "synthetic", "folder"):
    raise DataError(f"tf.data can be measured on a TFDS dataset in TFRecord form only, got config.data.name={config.name!r}")
  if "://" in config.dir:
    raise DataError(f"tf.data can be measured on a local disk only, got config.data.dir={config.dir!r}")
  stored = _builder(config).info.file_format.value
  if stored != "tfrecord":
    raise DataError(f"tf.data can be measured on TFRecord shards only, but {config.name} is stored as {stored}")


def tuned(config: DataConfig, *, batch: int, steps: int, threads: int):
  """Builds the pipeline that decodes, crops and flips.

  It makes `steps` batches of {"image": uint8 [batch, S, S, 3], "label": int32 [batch]}.
  """
  import tensorflow as tf

  def prepare(image, label):
    image = tf.image.resize(_random_crop(tf, image, config), (config.image_size,) * 2, "bicubic")
    return {"image": tf.image.random_flip_left_right(tf.saturate_cast(tf.round(image), tf.uint8)), "label": label}

  images = _prepared(tf, config, prepare, count=batch * steps, buffer=10 * batch, threads=threads)
  return images.batch(batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def official(config: DataConfig, *, batch: int, steps: int, threads: int):
  """Builds the pipeline of the whole recipe.

  It makes `steps` batches of {"image": float32 [batch, S, S, 3], "label" and "mix_label": int32, "ratio": float32}. `batch` must
  be even, because mixup is applied to one half of it and cutmix to the other.
  """
  import tensorflow as tf

  size, layers, magnitude = config.image_size, config.randaugment_layers, config.randaugment_magnitude
  if size is None or layers is None or magnitude is None:
    raise DataError("the official structure needs config.data.image_size, randaugment_layers and randaugment_magnitude")

  def prepare(image, label):
    image = tf.image.random_flip_left_right(_random_crop(tf, image, config))
    mask = _cutmix_mask(tf, size)
    a, b = (tf.random.gamma([], config.mixup_alpha) for _ in range(2))
    return {
      "image": tf.image.resize(image, (size, size), "bicubic"),
      "label": label,
      "mask": mask,
      "mixup_ratio": tf.math.divide_no_nan(a, a + b),
    }

  def mix(double):
    quarters = {name: tf.split(value, 4) for name, value in double.items()}
    up, cut = quarters["mixup_ratio"][0], quarters["mask"][2]
    (a, b, c, d), weight = quarters["image"], up[:, None, None, None]
    return {
      "image": tf.concat([weight * a + (1 - weight) * b, cut * c + (1 - cut) * d], 0),
      "label": tf.concat(quarters["label"][0::2], 0),
      "mix_label": tf.concat(quarters["label"][1::2], 0),
      "ratio": tf.concat([up, tf.reduce_mean(cut, (1, 2, 3))], 0),
    }

  def augment(example):
    image = tf.cast(tf.clip_by_value(example["image"], 0, 255), tf.uint8)
    image = randaugment(tf, image, layers=layers, magnitude=magnitude)
    return {**example, "image": (tf.cast(image, tf.float32) - config.mean) / config.std}

  images = _prepared(tf, config, prepare, count=2 * batch * steps, buffer=10 * batch, threads=threads)
  doubles = images.prefetch(tf.data.AUTOTUNE).batch(2 * batch, drop_remainder=True)
  mixed = doubles.map(mix, num_parallel_calls=tf.data.AUTOTUNE)
  augmented = mixed.unbatch().map(augment, num_parallel_calls=tf.data.AUTOTUNE)
  return augmented.batch(batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def randaugment(tf: Any, image, *, layers: int, magnitude: float):
  """Applies `layers` of the 16 operations, drawn with replacement, to uint8 [S, S, 3]; levels as in the published code.

  There is a conditional for each operation, as published; a switch would be quicker, but it is not what people ran.
  """
  for _ in range(layers):
    chosen = tf.random.uniform([], maxval=len(OPERATIONS), dtype=tf.int32)
    for place, operation in enumerate(OPERATIONS.values()):
      apply, keep = functools.partial(operation, tf, image, magnitude / 10), functools.partial(tf.identity, image)
      image = tf.ensure_shape(tf.cond(tf.equal(place, chosen), apply, keep), image.shape)
  return image


# ---- records


def _builder(config: DataConfig):
  """Returns TFDS's builder of the dataset, without asking Google's bucket for it."""
  import tensorflow_datasets as tfds

  return tfds.builder(config.name, data_dir=config.dir or None, try_gcs=False)


def _prepared(tf: Any, config: DataConfig, prepare: Callable, *, count: int, buffer: int, threads: int):
  """Makes a dataset of `prepare(JPEG bytes, label)` for `count` shuffled records, epoch after epoch, and reads no more.

  Args:
    tf: TensorFlow.
    config: the dataset, its training split, and the names of its features.
    prepare: makes an example of an image and its label.
    count: how many records.
    buffer: records among which they are shuffled.
    threads: threads of the pipeline.
  """
  parts = _builder(config).info.splits[config.train_split].file_instructions
  columns = (
    [part.filename for part in parts],
    *(tf.constant([getattr(part, name) for part in parts], tf.int64) for name in ("skip", "take")),
  )
  features = {config.image_key: tf.io.FixedLenFeature([], tf.string), config.label_key: tf.io.FixedLenFeature([], tf.int64)}

  def parse_and_prepare(payload):
    example = tf.io.parse_single_example(payload, features)
    return prepare(example[config.image_key], tf.cast(example[config.label_key], tf.int32))

  options = tf.data.Options()
  options.deterministic = False
  options.threading.private_threadpool_size = threads
  options.threading.max_intra_op_parallelism = 1
  options.experimental_optimization.map_parallelization = True
  options.experimental_optimization.parallel_batch = True
  files = tf.data.Dataset.from_tensor_slices(columns).shuffle(len(parts))
  records = files.interleave(
    lambda file, skip, take: tf.data.TFRecordDataset(file, buffer_size=1 << 20).skip(skip).take(take),
    cycle_length=min(16, len(parts)),
    num_parallel_calls=tf.data.AUTOTUNE,
  )
  shuffled = records.repeat().take(count).shuffle(min(buffer, count))
  return shuffled.map(parse_and_prepare, num_parallel_calls=tf.data.AUTOTUNE).with_options(options)


# ---- an image


def _random_crop(tf: Any, jpeg, config: DataConfig):
  """Decodes a random part of the image: uint8 [h, w, 3]."""
  begin, size, _ = tf.image.sample_distorted_bounding_box(
    tf.image.extract_jpeg_shape(jpeg),
    tf.zeros([1, 0, 4]),
    min_object_covered=0.1,
    area_range=config.crop_area,
    aspect_ratio_range=config.crop_aspect,
    max_attempts=10,
    use_image_if_no_bounding_boxes=True,
  )
  return tf.image.decode_and_crop_jpeg(jpeg, tf.concat([begin[:2], size[:2]], 0), channels=3)


def _cutmix_mask(tf: Any, size: int):
  """Makes a mask, float32 [size, size, 1]: 1 inside a box whose area is uniform before the edges clip it, and 0 outside."""
  half = tf.cast(tf.sqrt(tf.random.uniform([])) * size, tf.int32) // 2
  centre = tf.random.uniform([2], maxval=size, dtype=tf.int32)
  inside = tf.abs(tf.range(size)[None] - centre[:, None]) < half
  return tf.cast(inside[0][:, None] & inside[1][None], tf.float32)[..., None]


# ---- the 16 operations
# Each takes uint8 [S, S, 3] and a level, the magnitude divided by 10, and returns uint8 [S, S, 3].


def _blend(tf, base, image, factor):
  """Moves from `base` (factor 0) towards `image` (factor 1), or beyond it."""
  base, image = tf.cast(base, tf.float32), tf.cast(image, tf.float32)
  return tf.saturate_cast(base + factor * (image - base), tf.uint8)


def _transform(tf, image, matrix):
  """Moves the pixels by a matrix, to the nearest ones.

  As published, a fourth channel of ones tells which pixels come from inside; the others become grey.
  """
  side = image.shape[0]
  marked = tf.concat([image, tf.ones([side, side, 1], image.dtype)], axis=-1)
  moved = tf.raw_ops.ImageProjectiveTransformV3(
    images=marked[None],
    transforms=tf.reshape(tf.stack([tf.cast(value, tf.float32) for value in (*matrix, 0, 0)]), [1, 8]),
    output_shape=[side, side],
    fill_value=0.0,
    interpolation="NEAREST",
    fill_mode="CONSTANT",
  )[0]
  return tf.where(moved[..., 3:] > 0, moved[..., :3], tf.cast(GREY, image.dtype))


def _either_way(tf, value):
  """Gives the value a random sign."""
  return tf.where(tf.random.uniform([]) < 0.5, value, -value)


def _rotate(tf, image, level):
  angle, centre = _either_way(tf, math.radians(30) * level), (image.shape[0] - 1) / 2
  c, s = tf.cos(angle), tf.sin(angle)
  return _transform(tf, image, (c, -s, centre * (1 - c + s), s, c, centre * (1 - c - s)))


def _shift_x(tf, image, level):
  return _transform(tf, image, (1, 0, _either_way(tf, 100.0 * level), 0, 1, 0))


def _shift_y(tf, image, level):
  return _transform(tf, image, (1, 0, 0, 0, 1, _either_way(tf, 100.0 * level)))


def _shear_x(tf, image, level):
  return _transform(tf, image, (1, _either_way(tf, 0.3 * level), 0, 0, 1, 0))


def _shear_y(tf, image, level):
  return _transform(tf, image, (1, 0, 0, _either_way(tf, 0.3 * level), 1, 0))


def _by_channel(tf, image, function):
  return tf.stack([function(channel) for channel in tf.unstack(image, axis=2)], 2)


def _autocontrast(tf, image, level):
  def stretch(channel):
    low, high = (tf.cast(edge(channel), tf.float32) for edge in (tf.reduce_min, tf.reduce_max))
    scaled = lambda: tf.saturate_cast((tf.cast(channel, tf.float32) - low) * (255 / (high - low)), tf.uint8)
    return tf.cond(high > low, scaled, lambda: channel)

  return _by_channel(tf, image, stretch)


def _equalize(tf, image, level):
  def flatten(channel):
    values = tf.cast(channel, tf.int32)
    histogram = tf.histogram_fixed_width(values, [0, 255], nbins=256)
    step = (tf.size(values) - tf.boolean_mask(histogram, histogram > 0)[-1]) // 255
    table = lambda: tf.clip_by_value((tf.cumsum(histogram, exclusive=True) + step // 2) // step, 0, 255)
    return tf.cond(step > 0, lambda: tf.cast(tf.gather(table(), values), tf.uint8), lambda: channel)

  return _by_channel(tf, image, flatten)


def _contrast(tf, image, level):
  mean = tf.reduce_mean(tf.cast(tf.image.rgb_to_grayscale(image), tf.float32))
  return _blend(tf, tf.floor(mean), image, 0.1 + 1.8 * level)


def _sharpness(tf, image, level):
  kernel = tf.tile(tf.constant([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]])[..., None, None] / 13, [1, 1, 3, 1])
  smooth = tf.nn.depthwise_conv2d(tf.cast(image, tf.float32)[None], kernel, [1, 1, 1, 1], "VALID")[0]
  inner = _blend(tf, tf.floor(smooth), image[1:-1, 1:-1], 0.1 + 1.8 * level)
  inside = tf.pad(tf.ones_like(inner, tf.bool), [[1, 1], [1, 1], [0, 0]])
  return tf.where(inside, tf.pad(inner, [[1, 1], [1, 1], [0, 0]]), image)


def _posterize(tf, image, level):
  shift = max(0, 8 - int(4 * level))
  return tf.bitwise.left_shift(tf.bitwise.right_shift(image, tf.cast(shift, tf.uint8)), tf.cast(shift, tf.uint8))


def _solarize_add(tf, image, level):
  return tf.where(image < 128, tf.saturate_cast(tf.cast(image, tf.int32) + int(110 * level), tf.uint8), image)


def _cutout(tf, image, level):
  side = image.shape[0]
  centre = tf.random.uniform([2], maxval=side, dtype=tf.int32)
  offset = tf.range(side)[None] - centre[:, None]
  inside = (offset >= -int(40 * level)) & (offset < int(40 * level))
  return tf.where((inside[0][:, None] & inside[1][None])[..., None], tf.constant(GREY, tf.uint8), image)


OPERATIONS = {
  "AutoContrast": _autocontrast,
  "Equalize": _equalize,
  "Invert": lambda tf, image, level: 255 - image,
  "Rotate": _rotate,
  "Posterize": _posterize,
  "Solarize": lambda tf, image, level: tf.where(tf.cast(image, tf.int32) < int(256 * level), image, 255 - image),
  "SolarizeAdd": _solarize_add,
  "Color": lambda tf, image, level: _blend(
    tf, tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image)), image, 0.1 + 1.8 * level
  ),
  "Contrast": _contrast,
  "Brightness": lambda tf, image, level: _blend(tf, tf.zeros_like(image), image, 0.1 + 1.8 * level),
  "Sharpness": _sharpness,
  "ShearX": _shear_x,
  "ShearY": _shear_y,
  "TranslateX": _shift_x,
  "TranslateY": _shift_y,
  "Cutout": _cutout,
}
