"""Writes a program as a SavedModel of TensorFlow, for TensorFlow Serving and its like; to run it takes no JAX."""

import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from nfnets.export import stablehlo
from nfnets.export.program import Program

# jax.export's names of platforms: TensorFlow's.
_THEIRS = {"cpu": "CPU", "cuda": "CUDA", "rocm": "ROCM", "tpu": "TPU"}


def write(path: pathlib.Path, program: Program, about: dict[str, Any], *, force: bool = False) -> None:
  """Writes the directory, whole or not at all; its signature "serving_default" takes `images` and gives `logits`.

  The class names and the preprocessing lie in assets.extra/about.json.

  Args:
    path: the directory.
    program: from images to logits; the batch may be symbolic.
    about: becomes about.json.
    force: whether a directory that is already there is replaced.

  Raises:
    UserError: the weights are larger than the format holds. OSError: the directory cannot be written.
  """
  import tensorflow as tf  # pyrefly: ignore
  from tensorflow.compiler.tf2xla.python import xla  # pyrefly: ignore

  exported = stablehlo.exported(program)
  sizes = lambda shape: [size if isinstance(size, int) else None for size in shape]
  dtype = tf.as_dtype(exported.out_avals[0].dtype)

  @tf.function(input_signature=[tf.TensorSpec(sizes(program.input.shape), tf.as_dtype(program.input.dtype), name="images")])
  def serve(images):
    (logits,) = xla.call_module(
      [images],
      version=exported.calling_convention_version,
      module=exported.mlir_module_serialized,
      Tout=[dtype],
      Sout=[sizes(exported.out_avals[0].shape)],
      platforms=[_THEIRS[platform] for platform in exported.platforms],
    )
    return {"logits": logits}

  module = tf.Module()
  module.serve = serve
  with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as there:
    made = pathlib.Path(there) / "model"
    tf.saved_model.save(module, str(made), signatures=serve)
    (made / "assets.extra").mkdir()
    (made / "assets.extra" / "about.json").write_text(json.dumps(about, indent=2))
    if force and path.is_dir():
      shutil.rmtree(path)
    made.rename(path)


def read(path: pathlib.Path) -> Callable[[Any], Any]:
  """Reads such a directory back as a function from images to logits, both NumPy arrays."""
  import tensorflow as tf  # pyrefly: ignore

  model = tf.saved_model.load(str(path))
  return lambda images: model.signatures["serving_default"](images=tf.constant(images))["logits"].numpy()
