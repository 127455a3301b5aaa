"""A network with the preprocessing that it was evaluated with, and the names of its classes."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfnets import models
from nfnets.config import DataConfig
from nfnets.data.errors import UnreadableImage, printable, reason
from nfnets.data.images import decode
from nfnets.data.sources.folder import LARGEST
from nfnets.data.storage.regular import read_regular
from nfnets.errors import UserError
from nfnets.train.step.gradients import normalise

Photo = str | os.PathLike[str] | bytes | np.ndarray  # a file, its bytes, or uint8 [height, width, 3]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Classifier:
  """Turns photographs into probabilities of classes.

  Attributes:
    network: an nnx module; gives logits for prepared images.
    class_names: by label; empty where they are not known.
    preprocessing: the test_… fields, mean and std; formats and max_pixels say which images are decoded at all.
    loss: "softmax" or "sigmoid", which the probabilities follow from.
    source: where the weights come from.
  """

  network: models.Network
  class_names: tuple[str, ...]
  preprocessing: DataConfig
  loss: str
  source: str

  def __call__(self, photos: Sequence[Photo]) -> np.ndarray:
    """The probability of each class: float32 [photos, classes]. Raises UserError for a photograph that cannot be read."""
    logits = _logits(*nnx.split(self.network), self.prepare(photos))
    return np.asarray(jax.nn.softmax(logits) if self.loss == "softmax" else jax.nn.sigmoid(logits))

  def top(self, photos: Sequence[Photo], k: int = 5) -> list[list[tuple[str, float]]]:
    """The k most probable classes of each photograph, by name (or by label, where names are not known), with probabilities."""
    return [self.top_of(row, k) for row in self(photos)]

  def top_of(self, probabilities: np.ndarray, k: int = 5) -> list[tuple[str, float]]:
    """The k most probable classes of one photograph's probabilities, float [classes]."""
    names = self.class_names or [str(label) for label in range(self.network.num_classes)]
    return [(names[label], float(probabilities[label])) for label in np.argsort(-probabilities, kind="stable")[:k]]

  def prepare(self, photos: Sequence[Photo]) -> jax.Array:
    """Photographs as the network takes them: cropped, resized and normalised, float32 [photos, size, size, 3].

    Raises:
      UserError: a photograph cannot be read, or those of a network without resizing differ in size; the message names it.
    """
    if not len(photos):
      raise UserError("no photographs; expected at least one")
    squares = [self.square(photo) for photo in photos]
    if len({square.shape for square in squares}) > 1:
      raise UserError(
        f"the images have several sizes, {sorted({square.shape[:2] for square in squares})}, and this network takes them as they "
        "are (test_crop='none'); expected one size"
      )
    return normalise(jnp.asarray(np.stack(squares)), self.preprocessing)

  def square(self, photo: Photo) -> np.ndarray:
    """The pixels that the network sees, uint8 [size, size, 3]. Raises UserError for a photograph that cannot be read."""
    data = self.preprocessing
    rules = decode.Rules(formats=data.formats, max_pixels=data.max_pixels, upright=True)
    if isinstance(photo, np.ndarray):
      name, image = "an array", photo
    else:
      name = "bytes" if isinstance(photo, bytes) else printable(os.fspath(photo))
      try:
        image = decode.pixels(photo if isinstance(photo, bytes) else read_regular(os.fspath(photo), LARGEST), rules)
      except OSError as error:
        raise UserError(f"{name} cannot be read: {reason(error)}") from error
      except UnreadableImage as error:
        raise UserError(f"{name} is no image that can be read: {error}") from error
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
      raise UserError(f"{name} is {image.dtype} {image.shape}, expected uint8 [height, width, 3]")
    if data.test_crop == "none":
      return image
    assert data.test_image_size is not None  # `resolve.data_config` fills it in
    return decode.test_image(
      image, data.test_image_size, crop=data.test_crop, crop_pct=data.test_crop_pct, resize=data.test_resize
    )


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: nnx.GraphDef, state: Any, images: jax.Array) -> jax.Array:
  return nnx.merge(graph, state)(images)
