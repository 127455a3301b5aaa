"""Golden values of the published code, and the deterministic weights and inputs they were computed on.

README.md in this folder says which code, versions and settings produced the `.npz` files. Everything here needs numpy
alone and gives float32 values that depend on the parameter's path and shape only, never on call order.
"""

import math
import pathlib
import zlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent
# Gradient entries recorded for each parameter.
NUM_ENTRIES = 4


def load(name: str) -> dict[str, np.ndarray]:
  """Arrays of `<name>.npz` in this folder."""
  with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
    return {key: file[key] for key in file.files}


def generator(key: str) -> np.random.Generator:
  """A random generator that is a function of `key` alone."""
  return np.random.Generator(np.random.Philox(zlib.crc32(key.encode())))


def fill(path: str, shape: tuple[int, ...], *, standardized: bool = False) -> np.ndarray:
  """Non-trivial float32 value of the parameter or statistic `path`, e.g. "blocks/3/conv1/kernel".

  `standardized` marks a kernel that goes through weight standardization: each of its output channels gets an offset, so
  that leaving out the removal of the mean changes the result. In a plain convolution it would only blow up the signal.
  """
  draw = generator(path)
  leaf = path.rsplit("/", 1)[-1]
  if leaf == "skip_gain":
    return np.asarray(0.5 + 0.2 * draw.random(shape, dtype=np.float32), np.float32)
  if leaf == "var":
    return np.asarray(0.75 + 0.5 * draw.random(shape, dtype=np.float32), np.float32)
  normal = draw.standard_normal(shape, dtype=np.float32)
  if leaf in ("gain", "scale"):
    return np.asarray(1 + 0.2 * normal, np.float32)
  if leaf.startswith("bias") or leaf == "mean":
    return np.asarray(0.1 * normal, np.float32)
  if path == "fc/kernel":
    return np.asarray(0.05 * normal, np.float32)
  if leaf != "kernel":
    raise ValueError(f"no rule to fill {path!r}: expected a leaf kernel, gain, bias*, scale, skip_gain, mean or var")
  std = np.float32(1 / math.sqrt(math.prod(shape[:-1])))
  if standardized:
    normal = normal + draw.standard_normal(shape[-1:], dtype=np.float32) / 2
  return np.asarray(std * normal, np.float32)


def fill_all(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """`fill` for every path; a kernel whose layer also has a gain is a standardized one."""

  def standardized(path: str) -> bool:
    return path.endswith("/kernel") and path.removesuffix("kernel") + "gain" in shapes

  return {path: fill(path, tuple(shape), standardized=standardized(path)) for path, shape in shapes.items()}


def images(image_size: int, batch: int = 2) -> np.ndarray:
  """N(0, 1) images with structure at two scales, float32 [batch, image_size, image_size, 3].

  Independent pixels alone would fade at every pooling, and leave the deep layers next to nothing to respond to.
  """
  draw = generator(f"images/{image_size}")
  cell = 24
  cells = -(-image_size // cell)
  coarse = draw.standard_normal((batch, cells, cells, 3), dtype=np.float32)
  coarse = coarse.repeat(cell, axis=1).repeat(cell, axis=2)[:, :image_size, :image_size]
  fine = draw.standard_normal((batch, image_size, image_size, 3), dtype=np.float32)
  return np.float32(0.8) * coarse + np.float32(0.6) * fine


def labels(num_classes: int, batch: int = 2) -> np.ndarray:
  """Class indices, int32 [batch]."""
  return generator("labels").integers(0, num_classes, batch).astype(np.int32)


def probe(path: str, gradient: np.ndarray) -> np.ndarray:
  """What is recorded of a parameter's gradient: float64 [2 + NUM_ENTRIES].

  Its norm, its dot product with a N(0, 1) vector made from the path, and entries at positions made from the path.
  """
  flat = np.asarray(gradient).reshape(-1)
  vector = generator(f"{path}#vector").standard_normal(flat.size, dtype=np.float32)
  positions = generator(f"{path}#positions").integers(0, flat.size, NUM_ENTRIES)
  flat = flat.astype(np.float64)
  return np.concatenate([[np.linalg.norm(flat), flat @ vector.astype(np.float64)], flat[positions]])
