"""Features of images from a trained network: pooled vectors, maps of its stages; files of them, and two checks of their worth."""

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfnets import models
from nfnets.data.errors import printable, reason
from nfnets.errors import UserError
from nfnets.files import whole_file

LARGEST = 8 << 30  # bytes of all features together, which are held in memory until they are written
_PROBE = 256  # side of the image that the strides are found with, pixels; nothing is computed


def strides(network: models.Network) -> dict[int, str]:
  """The last output of the stem's layers or of a block at each stride, by the stride: {4: "blocks/0", 8: "blocks/2", …}."""
  found: dict[int, str] = {}

  def tap(name: str, x: jax.Array) -> None:
    if x.ndim == 4 and (name.startswith("stem") or name.startswith("blocks/") and name.count("/") == 1):
      found[_PROBE // x.shape[1]] = name

  graph, state = nnx.split(network)
  image = jax.ShapeDtypeStruct((1, _PROBE, _PROBE, 3), jnp.float32)
  jax.eval_shape(lambda state, image: nnx.merge(graph, state).outputs(image, tap=tap)["logits"], state, image)
  return found


def reader(network: models.Network, layers: Sequence[str]) -> Callable[[models.Network, jax.Array], dict[str, jax.Array]]:
  """Says what to read of a network, for `over_devices`.

  Args:
    network: the network.
    layers: "pool", and strides such as "8" for maps.

  Returns:
    A function that gives {"pool": float32 [B, C], "stride_8": float32 [B, h, w, C], …}.

  Raises:
    UserError: the network has no such layer.
  """
  known = strides(network)
  unknown = [layer for layer in layers if layer != "pool" and layer not in map(str, known)]
  if unknown or not layers:
    raise UserError(
      f"--layers={','.join(layers)}: expected pool, or strides that the network has maps of: {', '.join(map(str, sorted(known)))}"
    )
  wanted = {known[int(layer)]: f"stride_{layer}" for layer in layers if layer != "pool"}

  def read(network: models.Network, images: jax.Array) -> dict[str, jax.Array]:
    kept: dict[str, jax.Array] = {}

    def tap(name: str, x: jax.Array) -> None:
      if name in wanted:
        kept[wanted[name]] = x.astype(jnp.float32)

    pool = network.outputs(images, tap=tap)["pool"]
    return {**({"pool": pool} if "pool" in layers else {}), **kept}

  return read


def check_size(
  network: models.Network, read: Callable[[models.Network, jax.Array], Any], shape: tuple[int, ...], images: int
) -> None:
  """Raises UserError where the features of so many images of this shape, (height, width, 3), would take too much memory."""
  graph, state = nnx.split(network)
  one = jax.eval_shape(
    lambda state, image: read(nnx.merge(graph, state), image), state, jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  )
  size = images * sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(one))
  if size > LARGEST:
    raise UserError(
      f"the features of {images:,} images take {size / 1e9:,.0f} GB, more than the {LARGEST / 1e9:,.0f} GB that are held; "
      "expected fewer or deeper --layers, a smaller --resolution, or a part of the images (--split)"
    )


# ---- files


def write(path: pathlib.Path, features: dict[str, np.ndarray], facts: dict[str, np.ndarray]) -> None:
  """Writes features, whole or not at all: as npz, or as Parquet where the name ends in .parquet.

  Args:
    path: the file.
    features: by layer, a row for each image.
    facts: further columns, such as "image" (names), "label", "class"; a row for each image.

  Raises:
    UserError: the file cannot be written, or pyarrow is missing.
  """
  try:
    if path.suffix == ".parquet":
      _write_parquet(path, features, facts)
    else:
      with whole_file(path) as file:
        np.savez(file, allow_pickle=False, **features, **facts)
  except OSError as error:
    raise UserError(f"--out={path}: cannot be written: {reason(error)}") from error


def names_of(names: Sequence[str]) -> np.ndarray:
  """Names as a column: no pickle, nothing that a terminal does not take."""
  return np.asarray([printable(name) for name in names], np.str_)


def _write_parquet(path: pathlib.Path, features: dict[str, np.ndarray], facts: dict[str, np.ndarray]) -> None:
  """Writes each feature as a column of lists of one length; the schema's metadata say the shape of an image's features."""
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise UserError(f"--out={path}: Parquet needs pyarrow (pip install pyarrow); or give a name that ends in .npz") from error
  columns: dict[str, Any] = {name: pyarrow.array(values.tolist()) for name, values in facts.items()}
  for name, rows in features.items():
    columns[name] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), math.prod(rows.shape[1:]))
  shapes = {f"shape of {name}": ",".join(map(str, rows.shape[1:])) for name, rows in features.items()}
  with whole_file(path) as file:
    pyarrow.parquet.write_table(pyarrow.table(columns).replace_schema_metadata(shapes), file)


# ---- checks


def check(
  train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, *, k: int = 10
) -> dict[str, float]:
  """How well features separate the classes: top-1 accuracy of two classifiers that are fitted on some and tested on others.

  Args:
    train, test: float32 [n, C], or maps [n, h, w, C], which are averaged over space.
    train_labels, test_labels: int [n].
    k: neighbours that vote, by cosine similarity.

  Returns:
    {"knn", "linear"}: of the neighbours' vote, and of a logistic regression on the standardized features.
  """
  import warnings

  from sklearn import exceptions, linear_model, neighbors, pipeline, preprocessing

  train, test = (rows.reshape(len(rows), -1, rows.shape[-1]).mean(axis=1) for rows in (train, test))
  knn = neighbors.KNeighborsClassifier(n_neighbors=min(k, len(train)), metric="cosine")
  linear = pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=1000))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", exceptions.ConvergenceWarning)  # a probe that has not quite converged is as good a check
    return {
      name: float(model.fit(train, train_labels).score(test, test_labels)) for name, model in (("knn", knn), ("linear", linear))
    }
