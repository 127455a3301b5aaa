"""Golden values of the published code, and the deterministic weights and inputs they were computed on.

README.md in this folder says which code, versions and settings produced the `.npz` files. Everything in this file needs NumPy
alone and gives values that depend on the parameter's path and shape, and not on the order of calls.
"""

import math
import pathlib
import zlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent
# How many entries of each parameter's gradient are recorded.
NUM_ENTRIES = 4


def load(name: str) -> dict[str, np.ndarray]:
  """Reads `<name>.npz` of this folder: {array's name: array}."""
  with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
    return {key: file[key] for key in file.files}


def generator(key: str) -> np.random.Generator:
  """Makes a random generator that is a function of `key` alone."""
  return np.random.Generator(np.random.Philox(zlib.crc32(key.encode())))


def fill(path: str, shape: tuple[int, ...], *, standardized: bool = False) -> np.ndarray:
  """Makes a parameter's or statistic's value, float32, at which mistakes show: no gain is 1, no bias is 0.

  Args:
    path: its path, such as "blocks/3/conv1/kernel", whose last name decides the distribution.
    shape: its shape.
    standardized: whether a kernel goes through weight standardization. Each of its output channels then gets an offset, so that
      the result is another one if the mean is not removed. In a plain convolution the offset would only make the signal large.

  Raises:
    ValueError: no distribution is known for the last name of the path.
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
    raise ValueError(f"path={path!r}: expected one that ends in kernel, gain, bias*, scale, skip_gain, mean or var")
  std = np.float32(1 / math.sqrt(math.prod(shape[:-1])))
  if standardized:
    normal += draw.standard_normal(shape[-1:], dtype=np.float32) / 2
  normal *= std  # in place: the largest networks have 200 million numbers
  return normal


def fill_all(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """Calls `fill` for every path of {path: shape}; a kernel beside a gain is a standardized one."""

  def standardized(path: str) -> bool:
    return path.endswith("/kernel") and path.removesuffix("kernel") + "gain" in shapes

  return {path: fill(path, tuple(shape), standardized=standardized(path)) for path, shape in shapes.items()}


def images(image_size: int, batch: int = 2) -> np.ndarray:
  """Makes images, float32 [batch, image_size, image_size, 3], whose values are N(0, 1), with structure at two scales.

  Each pooling averages independent pixels away, so that they alone would leave deep layers almost nothing to respond to.
  """
  draw = generator(f"images/{image_size}")
  cell = 24
  cells = -(-image_size // cell)
  coarse = draw.standard_normal((batch, cells, cells, 3), dtype=np.float32)
  coarse = coarse.repeat(cell, axis=1).repeat(cell, axis=2)[:, :image_size, :image_size]
  fine = draw.standard_normal((batch, image_size, image_size, 3), dtype=np.float32)
  return np.float32(0.8) * coarse + np.float32(0.6) * fine


def labels(num_classes: int, batch: int = 2) -> np.ndarray:
  """Makes class indices, int32 [batch]."""
  return generator("labels").integers(0, num_classes, batch).astype(np.int32)


def probe(path: str, gradient: np.ndarray) -> np.ndarray:
  """Computes what is recorded of a parameter's gradient, float64 [2 + NUM_ENTRIES].

  These are its norm, its dot product with a vector, and its entries at some positions; the path decides vector and positions.
  """
  flat = np.asarray(gradient).reshape(-1)
  vector = generator(f"{path}#vector").standard_normal(flat.size, dtype=np.float32)
  positions = generator(f"{path}#positions").integers(0, flat.size, NUM_ENTRIES)
  flat = flat.astype(np.float64)
  return np.concatenate([[np.linalg.norm(flat), flat @ vector.astype(np.float64)], flat[positions]])
