"""Where a checkpoint comes from, and whether it is of the run that wants to go on from it."""

import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import platform
import subprocess
from typing import Any

import jax

import nfnets
from nfnets.config import Config
from nfnets.train.checkpoints.errors import CheckpointError

# Fields that may change between a run and its continuation: they alter neither the parameters (beyond rounding) nor the images,
# or `check_same_data` looks at what they do alter.
MAY_DIFFER = (
  "data.dir",
  "data.index_dir",
  "data.threads",
  "data.max_corrupt",
  "data.shuffle_block",
  "data.test_split",
  "data.test_crop",
  "data.test_image_size",
  "eval_batch",
  "log_every",
  "eval_every",
  "checkpoint_every",
  "keep_checkpoints",
  "accumulate",
  "shard",
  "keep_every",
  "keep_best",
  "on_bad_step",
  "spike",
  "max_bad_steps",
  "watchdog",
)
_LIBRARIES = {"jax": "jax", "jaxlib": "jaxlib", "flax": "flax", "orbax": "orbax-checkpoint", "optax": "optax", "numpy": "numpy"}


def check_same_run(saved: dict[str, Any], config: Config, where: str, *, only: tuple[str, ...] = ("",)) -> None:
  """Raises CheckpointError where a checkpoint's configuration is not this one's, naming the fields.

  `only`: prefixes of the fields to compare, all by default. A field that is newer than the checkpoint had its default.
  """
  defaults = to_json(Config())
  saved = {key: {**defaults[key], **value} if isinstance(defaults.get(key), dict) else value for key, value in saved.items()}
  before, now = _flat({**defaults, **saved}), _flat(to_json(config))
  odd = sorted(key for key in before | now if before.get(key) != now.get(key) and key not in MAY_DIFFER and key.startswith(only))
  if odd:
    lines = ", ".join(f"config.{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in odd[:4])
    raise CheckpointError(
      f"{where} belongs to another configuration: {lines}{' …' if len(odd) > 4 else ''}; take another "
      "directory, or the configuration it was started with"
    )


def check_same_data(
  meta: dict[str, Any], config: Config, where: str, *, records: int, num_classes: int, shuffle_block: int, rows: int | None
) -> None:
  """Raises CheckpointError where the images or random numbers that a checkpoint's run saw are not those this one would see.

  meta: `Checkpoints.meta`. records: length of the training set, which the order of the images follows from, as it does from
  shuffle_block. rows: images that BatchNorm normalizes together; changes with the devices and config.accumulate.
  """
  data = {"shuffle_block": shuffle_block, "rows": rows, **meta["data"]}
  pairs = {
    "training images": (data["records"], records),
    "classes": (meta["num_classes"], num_classes),
    "config.data.shuffle_block (unset: 32 for a bucket, 1 for a disk)": (data["shuffle_block"], shuffle_block),
    "images normalized together (config.accumulate, or devices with config.batch_stats='device')": (data["rows"], rows),
    "jax_default_prng_impl": (meta["rng"]["implementation"], random_numbers(config)["implementation"]),
  }
  odd = [f"{name} {before}, now {now}" for name, (before, now) in pairs.items() if before != now]
  if odd:
    raise CheckpointError(f"{where} saw other data: {'; '.join(odd)}; take another directory, or the data it was started with")


def to_json(config: Config) -> dict[str, Any]:
  """The configuration as JSON has it (tuples become lists)."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def random_numbers(config: Config) -> dict[str, Any]:
  """What every random number of a run follows from, beside the step."""
  return {"seed": config.seed, "implementation": str(jax.config.jax_default_prng_impl)}


@functools.cache
def versions() -> dict[str, str]:
  return {
    "nfnets": nfnets.__version__,
    "python": platform.python_version(),
    **{name: importlib.metadata.version(package) for name, package in _LIBRARIES.items()},
  }


@functools.cache
def commit() -> str | None:
  """The git commit of this nfnets, with "-dirty" after it where files differ; None where it is installed."""
  root = pathlib.Path(nfnets.__file__).resolve().parent.parent
  if not (root / ".git").exists():
    return None
  command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
  try:
    return subprocess.run(command, capture_output=True, check=True, text=True, timeout=10).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  out = {}
  for key, value in tree.items():
    out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
  return out
