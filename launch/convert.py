"""Converts weights: python -m launch.convert SRC DST [--to=nfnets|timm|haiku] [--check] [--force]

SRC is a file of weights in our names, Haiku's (the published .npz, a true npz, safetensors) or timm's (safetensors; .pth where
torch is installed), hf://OWNER/NAME, the address of a published file, a workdir, or WORKDIR/checkpoints/STEP. DST is a directory,
which may be new, or a file: .safetensors, for Haiku .npz and .pkl too. A model card (README.md) is written beside the weights,
and with --to=timm the config.json that timm reads.
--check compares the outputs of every stage with timm's own on the same weights (timm and torch must be installed); with
--official=DIR, which holds the release's package nfnets, those of the release, and its statistics of every block (dm-haiku).
"""

import hashlib
import pathlib

from absl import flags

from launch import cli
from launch.progress import plain_console


def define(values: flags.FlagValues) -> None:
  flags.DEFINE_enum("to", "nfnets", ["nfnets", "timm", "haiku"], "Whose names and layout DST has.", flag_values=values)
  flags.DEFINE_boolean("check", False, "Print how far timm's outputs are from ours, for every stage.", flag_values=values)
  flags.DEFINE_string("official", None, "With --check: the folder that holds the release's nfnets/.", flag_values=values)
  flags.DEFINE_boolean("force", False, "Replace files that are already there.", flag_values=values)


def run(values: flags.FlagValues, *arguments: str) -> int:
  if len(arguments) != 2:
    raise cli.UsageError(
      f"expected SRC and DST, got {' '.join(arguments) or 'none'}; e.g. python -m launch.convert F0_haiku.npz nfnet_f0"
    )
  from nfnets.train import resolve
  from nfnets.train.initial import read_weights
  from nfnets.weights import parity, remote, writer

  source, out = pathlib.Path(remote.local(arguments[0])), pathlib.Path(arguments[1])
  stored = read_weights(source)
  console = plain_console()
  console.print(f"{stored.source}: {writer.described(stored)}, {stored.num_classes:,} classes")
  if values.official and not values.check:
    raise cli.UsageError("--official is for --check, which is missing")
  if values.check:
    rows = parity.against_release(stored, values.official) if values.official else parity.against_timm(stored)
    for stage, error in rows:
      console.print(f"{stage}: relative error {error:.1e}")
  converted = writer.convert(stored, values.to)
  if converted.remark:
    console.print(f"note: {converted.remark}")
  for file in writer.write(out, converted, stored, resolve.preprocessing(stored), sha256=_sha256(source), force=values.force):
    console.print(f"{file}: {file.stat().st_size:,} bytes")
  return 0


def _sha256(path: pathlib.Path) -> str:
  """The hash of a file; empty for a directory."""
  if path.is_dir():
    return ""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
  cli.main(run, define, __doc__, arguments=True)
