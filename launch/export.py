"""Writes a trained network in a form that runs without this package:
  python -m launch.export --weights=SOURCE --to=onnx --out=FILE.onnx [--nchw] [--uint8]
  python -m launch.export --weights=SOURCE --to=stablehlo --out=FILE.zip [--fold] [--uint8] [--dtype=bfloat16]
  python -m launch.export --weights=SOURCE --to=saved --out=DIR [--fold] [--uint8]
  python -m launch.export --weights=SOURCE --to=safetensors|timm --out=FILE.safetensors

SOURCE is a file of weights, a workdir, or WORKDIR/checkpoints/STEP.
onnx: for onnxruntime and its like; always folded. stablehlo: for jax alone, see README. saved: TensorFlow's SavedModel. All three
take batches of any size, and hold the names of the classes and the preprocessing. safetensors: the weights, for nfnets itself;
timm: the same in timm's names, with its config.json (launch.convert has more to choose).
--check runs the file and prints the largest difference from the network, relative to the largest logit. --bench prints a table of
milliseconds a batch, before and after folding.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import rich.table
from absl import flags

from launch import cli
from launch.progress import plain_console
from nfnets.errors import UserError
from nfnets.files import write_file

FORMATS = ("onnx", "stablehlo", "saved", "timm", "safetensors")
WEIGHTS = ("timm", "safetensors")  # formats of weights alone
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # the largest relative difference that --check accepts


def define(values: flags.FlagValues) -> None:
  text = lambda name, meaning: flags.DEFINE_string(name, None, meaning, flag_values=values)
  switch = lambda name, meaning: flags.DEFINE_boolean(name, False, meaning, flag_values=values)
  whole = lambda name, default, meaning: flags.DEFINE_integer(name, default, meaning, lower_bound=1, flag_values=values)
  text("weights", "A file of weights, a workdir, or WORKDIR/checkpoints/STEP.")
  text("to", f"The format: {', '.join(FORMATS)}.")
  text("out", "The file to write; of saved, and if you like of timm, a directory.")
  text("dtype", "What convolutions compute in, float32 or bfloat16; by default as in training.")
  switch("fold", "stablehlo, saved: fold standardization and scales into the convolutions.")
  switch("uint8", "Take uint8 pixels and normalise them inside, instead of normalised float32.")
  switch("nchw", "onnx: take images as [batch, 3, height, width].")
  whole("image_size", None, "Pixels a side, instead of the size that the network was evaluated at.")
  switch("check", "Run the file and compare its logits with the network's.")
  switch("bench", "Print the time of a batch before and after folding.")
  whole("batch", 1, "--bench: images a batch.")
  switch("force", "Replace a file that is already there.")


def run(values: flags.FlagValues) -> int:
  out = _check_flags(values)
  from nfnets.train.initial import read_weights

  stored = read_weights(values.weights)
  if values.to in WEIGHTS:
    return export_weights(values, out, stored)
  from nfnets.weights.network import build

  dtype = values.dtype or ("float32" if values.to == "onnx" else stored.config.model.dtype)
  job = Job(values=values, out=out, stored=stored, network=build(stored, dtype=dtype), dtype=dtype)
  return job.run()


def export_weights(values: flags.FlagValues, out: pathlib.Path, stored: Any) -> int:
  """Writes the weights alone, in our names or timm's."""
  from nfnets.train import resolve
  from nfnets.weights import writer
  from nfnets.weights.stored import as_file

  console = plain_console()
  if values.to == "timm":
    converted = writer.convert(stored, "timm")
    if converted.remark:
      console.print(f"note: {converted.remark}")
    files = writer.write(out, converted, stored, resolve.preprocessing(stored), force=values.force)
  else:
    _write(out, lambda: write_file(out, as_file(stored.arrays, _facts(stored))))
    files = [out]
  for file in files:
    console.print(f"{file}: {len(stored.arrays)} arrays of {stored.source}, {file.stat().st_size:,} bytes")
  return 0


def _check_flags(values: flags.FlagValues) -> pathlib.Path:
  """Answers mistakes before anything is read; returns the file to write."""
  for name, example in (("weights", "runs/digits"), ("to", "onnx"), ("out", "digits.onnx")):
    if not values[name].value:
      raise cli.UsageError(f"--{name} is missing, e.g. --{name}={example}")
  if values.to not in FORMATS:
    raise cli.UsageError(f"--to={values.to}: expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
  if values.dtype not in (None, *TOLERANCE):
    raise cli.UsageError(f"--dtype={values.dtype}: expected float32 or bfloat16")
  if values.to == "onnx" and values.dtype == "bfloat16":
    raise cli.UsageError("--dtype=bfloat16 --to=onnx: few runtimes convolve bfloat16; expected --dtype=float32 or --to=stablehlo")
  if values.nchw and values.to != "onnx":
    raise cli.UsageError(f"--nchw --to={values.to}: expected --to=onnx")
  unused = [name for name in ("fold", "uint8", "dtype", "image_size", "check", "bench") if values[name].value]
  if values.to in WEIGHTS and unused:
    raise cli.UsageError(f"--{unused[0]} --to={values.to}: weights alone are written; expected --to=onnx, stablehlo or saved")
  _need(values)
  out = pathlib.Path(values.out)
  if not out.parent.is_dir():
    raise cli.UsageError(f"--out={out}: there is no directory {out.parent}")
  if values.to != "timm" and (out.is_dir() and values.to != "saved" or out.exists() and not values.force):
    directory = out.is_dir() and values.to != "saved"
    raise cli.UsageError(f"--out={out} is already there; " + ("it is a directory" if directory else "--force replaces it"))
  if not os.access(out.parent, os.W_OK):
    raise cli.UsageError(f"--out={out}: no permission to write into {out.parent}")
  return out


def _need(values: flags.FlagValues) -> None:
  """Raises UsageError where a package is missing that the format needs, before minutes are spent."""
  packages = {
    "onnx": ["onnx"] + ["onnxruntime"] * (values.check or values.bench),
    "stablehlo": ["flatbuffers"],
    "saved": ["tensorflow"],
  }
  for package in packages.get(values.to, []):
    if importlib.util.find_spec(package) is None:
      raise cli.UsageError(f"--to={values.to} needs the package {package}, which is not installed: pip install {package}")


def _write(out: pathlib.Path, write: Callable[[], None]) -> None:
  try:
    write()
  except OSError as error:
    raise UserError(f"--out={out}: {error.strerror}") from error


def _facts(stored: Any) -> dict[str, Any]:
  """What turns photographs into the network's input, and its output into words."""
  from nfnets.train import resolve
  from nfnets.weights.stored import facts_of

  return facts_of(stored, resolve.preprocessing(stored))


@dataclasses.dataclass(kw_only=True)
class Job:
  """One network on its way into a file."""

  values: flags.FlagValues
  out: pathlib.Path
  stored: Any
  network: Any
  dtype: str

  def __post_init__(self):
    from nfnets import models
    from nfnets.data.images.decode import resized_side
    from nfnets.export.stablehlo import symbolic_shape

    model, facts = self.stored.config.model, _facts(self.stored)
    shown = facts["preprocessing"]
    self.size = self.values.image_size or shown["size"] or models.variant(model.name, **model.all_overrides()).test_resolution
    self.shape = symbolic_shape(self.size)
    self.pixels = (shown["mean"], shown["std"]) if self.values.uint8 else None
    resized = resized_side(self.size, crop=shown["crop"], crop_pct=shown["crop_pct"])
    self.about = {
      "class_names": facts["class_names"],
      "preprocessing": {**shown, "size": self.size, "resized": resized},
      "model": model.name,
      "source": self.stored.source,
      "loss": self.stored.config.loss,
      "input": "uint8" if self.values.uint8 else "float32, normalised: (pixels - mean) / std",
      "layout": "NCHW" if self.values.nchw else "NHWC",
      "dtype": self.dtype,
    }

  def run(self) -> int:
    """Writes the file, and checks and times it where that is asked for; returns the exit status."""
    from nfnets.export import program
    from nfnets.export.fold import fold

    whole = program.of_network(self.network, self.shape, self.pixels)
    folded = fold(whole) if self.values.fold or self.values.to == "onnx" or self.values.bench else whole
    chosen = folded if self.values.fold or self.values.to == "onnx" else whole
    console = plain_console()
    if self.values.to == "onnx":
      from nfnets.export import onnx

      model = onnx.model(folded, self.about, nchw=self.values.nchw)
      _write(self.out, lambda: write_file(self.out, model.SerializeToString()))
      detail = f"opset {onnx.OPSET}, {len(model.graph.node):,} nodes"
    elif self.values.to == "saved":
      from nfnets.export import savedmodel

      _write(self.out, lambda: savedmodel.write(self.out, chosen, self.about, force=self.values.force))
      detail = "SavedModel"
    else:
      from nfnets.export import stablehlo

      _write(self.out, lambda: stablehlo.write(self.out, chosen, self.about))
      detail = f"StableHLO for {', '.join(stablehlo.PLATFORMS)}"
    counts = f"{len(whole.operations()):,} operations"
    if chosen is not whole:
      counts += f", folded {len(chosen.operations()):,}"
    size = sum(file.stat().st_size for file in [self.out, *self.out.rglob("*")] if file.is_file())
    console.print(f"{self.out}: {self.stored.source}, {self.size} px, {detail}, {counts}, {size:,} bytes")
    status = self.check(console) if self.values.check else 0
    if self.values.bench:
      self.bench(console)
    return status

  def images(self, batch: int) -> np.ndarray:
    """Random images as the file takes them, but always [batch, height, width, 3]."""
    rng, shape = np.random.default_rng(0), (batch, self.size, self.size, 3)
    return rng.integers(0, 256, shape, np.uint8) if self.values.uint8 else rng.normal(size=shape).astype(np.float32)

  def exported(self) -> Callable[[np.ndarray], Any]:
    """The file as a function from images to logits, as its users run it."""
    if self.values.to == "stablehlo":
      import jax

      from nfnets.export import stablehlo

      return jax.jit(stablehlo.read(self.out))
    if self.values.to == "saved":
      from nfnets.export import savedmodel

      return savedmodel.read(self.out)
    import onnxruntime

    session = onnxruntime.InferenceSession(self.out, providers=["CPUExecutionProvider"])
    order = (0, 3, 1, 2) if self.values.nchw else (0, 1, 2, 3)
    return lambda images: session.run(["logits"], {"images": np.ascontiguousarray(images.transpose(order))})[0]

  def check(self, console: Any) -> int:
    """Compares the file's logits with the network's on batches of one and three; returns 1 where they differ too much."""
    import jax

    from nfnets.export import program

    exported, worst = self.exported(), 0.0
    fn, state = program.logits(self.network, self.pixels)
    for batch in (1, 3):
      images = self.images(batch)
      expected = np.asarray(jax.jit(fn)(state, images))
      largest = np.abs(expected).max() or 1.0  # a classifier that starts from zero gives zeros
      worst = float(np.maximum(worst, np.abs(np.asarray(exported(images)) - expected).max() / largest))  # NaN stays NaN
    good = worst <= TOLERANCE[self.dtype]
    console.print(
      f"check: largest difference {worst:.1e}, {'accepted' if good else 'NOT accepted'} (up to {TOLERANCE[self.dtype]})"
    )
    return 0 if good else 1

  def timms(self) -> dict[str, Callable[[np.ndarray], Any]]:
    """timm's own network with the same weights, by its name and PyTorch's version."""
    from nfnets.weights import parity

    theirs = parity.timm_module(self.stored)
    import torch  # pyrefly: ignore

    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in self.pixels or ((0.0,), (1.0,)))

    def run(images: np.ndarray) -> Any:
      with torch.inference_mode():
        return theirs((torch.from_numpy(images).permute(0, 3, 1, 2).float() - mean) / std)

    return {f"timm's, PyTorch {torch.__version__}": run}

  def bench(self, console: Any) -> None:
    """Prints the time of a batch: the network as it is, folded, the file, and timm's where it is installed."""
    import jax

    from nfnets.export import program
    from nfnets.export.fold import fold
    from nfnets.measure.latency import latency

    images = self.images(self.values.batch)
    fn, state = program.logits(self.network, self.pixels)
    folded = fold(program.of_network(self.network, images.shape, self.pixels))
    # The weights are an argument here, as where the network is used: as constants, XLA would standardize them while it compiles.
    before = functools.partial(jax.jit(fn), state)
    programs = {"before folding": before, "after folding": jax.jit(folded), str(self.out): self.exported()}
    try:
      programs |= self.timms()
    except UserError as error:
      console.print(f"without timm: {error}")
    title = (
      f"milliseconds, batches of {self.values.batch} at {self.size} px on {jax.devices()[0].device_kind}, medians of 15 rounds"
    )
    table = rich.table.Table("program", "ms", title=title, title_justify="left")
    for name, milliseconds in latency(programs, images).items():
      table.add_row(name, f"{milliseconds:.2f}")
    console.print(table)


if __name__ == "__main__":
  cli.main(run, define, __doc__)
