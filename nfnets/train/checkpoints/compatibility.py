"""Where a checkpoint comes from, and whether it is of the run that wants to go on from it."""

import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import platform
import subprocess
from collections.abc import Sequence
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
  "data.test_crop_pct",
  "data.test_resize",
  "data.test_image_size",
  "init.weights",
  "init.new_head",
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
  """What a run's images, their order and its arithmetic follow from; a continuation must find the same.

  Attributes:
    config: the configuration, see `check_same_run` for the fields that may change.
    class_names: the name of each class, by label.
    fingerprint: of the training set (`Source.fingerprint`).
    records: length of the training set, which the order of the images follows from.
    shuffle_block: records that stay together in that order, which follows from it too.
    rows_normalized: images that BatchNorm normalizes together; None without it. Changes with the devices and config.accumulate.
    rows_ascended: images of a device that SAM's ascent is taken on; None without it. Changes with the devices.
  """

  config: Config
  class_names: tuple[str, ...]
  records: int
  fingerprint: str = ""
  shuffle_block: int = 1
  rows_normalized: int | None = None
  rows_ascended: int | None = None

  def data(self) -> dict[str, Any]:
    """What a checkpoint's "data" says of it, beside the position in the stream of images."""
    return {
      "seed": self.config.seed,
      "class_names": list(self.class_names),
      "fingerprint": self.fingerprint,
      "records": self.records,
      "shuffle_block": self.shuffle_block,
      "rows": self.rows_normalized,
      "ascent_rows": self.rows_ascended,
    }


def check_same_run(saved: dict[str, Any], config: Config, workdir: str, *, only: tuple[str, ...] = ("",)) -> None:
  """Compares a checkpoint's configuration with this one.

  Args:
    saved: the configuration as the checkpoint's "config" has it; a field that is newer than the checkpoint had its default.
    config: this configuration.
    workdir: for the message.
    only: prefixes of the fields to compare, all by default; fields of MAY_DIFFER are never compared.

  Raises:
    CheckpointError: a field differs; the message names up to four, with both values.
  """
  defaults = to_json(Config())
  saved = {key: {**defaults[key], **value} if isinstance(defaults.get(key), dict) else value for key, value in saved.items()}
  before, now = _flat({**defaults, **saved}), _flat(to_json(config))
  compared = [key for key in sorted(before | now) if key not in MAY_DIFFER and key.startswith(only)]
  differing = [key for key in compared if before.get(key) != now.get(key) and not _is_longer(key, before, now)]
  if differing:
    lines = ", ".join(f"config.{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in differing[:4])
    raise CheckpointError(
      f"{workdir} belongs to another configuration: {lines}{' …' if len(differing) > 4 else ''}; take another "
      "directory, or the configuration it was started with"
    )


def _is_longer(key: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
  """Whether a run is only prolonged."""
  return key == "epochs" and now[key] > before.get(key, now[key])


def class_difference(before: Sequence[str], now: Sequence[str]) -> str:
  """Says how the classes of a data set differ from those before, by label; empty if they do not."""
  if tuple(before) == tuple(now):
    return ""
  if len(before) != len(now):
    return f"classes {len(before):,}, now {len(now):,}"
  differing = [label for label, names in enumerate(zip(before, now, strict=True)) if names[0] != names[1]]
  label = differing[0]
  order = "the same classes in another order: " if sorted(before) == sorted(now) else ""
  others = f" (and {len(differing) - 1:,} more)" if len(differing) > 1 else ""
  return f"{order}class {label} was {before[label]!r}, is {now[label]!r}{others}"


def check_same_data(meta: dict[str, Any], facts: RunFacts, workdir: str) -> None:
  """Compares the images and random numbers that a checkpoint's run saw with those that this one would see.

  Args:
    meta: the checkpoint's, `CheckpointReader.meta`. What an older nfnets did not note is not compared.
    facts: of this run.
    workdir: for the message.

  Raises:
    CheckpointError: something differs; the message names all of it, with both values.
  """
  names = {
    "records": "training images",
    "shuffle_block": "config.data.shuffle_block (unset: 32 for a bucket, 1 for a disk)",
    "rows": "images normalized together (config.accumulate, or devices with config.batch_stats='device')",
    "ascent_rows": "images of a device that the ascent of SAM is taken on (config.optim.sam_rho: another number of devices is "
    "another algorithm)",
  }
  before, now = meta["data"], facts.data()
  pairs = {label: (before.get(name, now[name]), now[name]) for name, label in names.items()}
  pairs["jax_default_prng_impl"] = meta["rng"]["implementation"], random_numbers(facts.config)["implementation"]
  differing = [f"{label} {old}, now {new}" for label, (old, new) in pairs.items() if old != new]
  if "class_names" not in before and meta["num_classes"] != len(facts.class_names):
    differing.append(f"classes {meta['num_classes']}, now {len(facts.class_names)}")
  if difference := class_difference(before.get("class_names", facts.class_names), facts.class_names):
    differing.append(difference)
  if not differing and before.get("fingerprint", facts.fingerprint) != facts.fingerprint:
    differing.append(f"files of other names or lengths (fingerprint {before['fingerprint']}, now {facts.fingerprint})")
  if differing:
    raise CheckpointError(
      f"{workdir} saw other data: {'; '.join(differing)}; take another directory, or the data it was started with"
    )


def check_same_order(meta: dict[str, Any], order_digest: str, workdir: str) -> None:
  """Compares the order in which the next epoch's images were to come with the order that this machine would give them.

  The order is NumPy's, whose generators promise their stream for one version only.

  Raises:
    CheckpointError: the order is another; the message names the versions of NumPy.
  """
  saved = meta["data"].get("order_digest", "")
  if saved and saved != order_digest:
    raise CheckpointError(
      f"{workdir}: the images of the next epoch would come in another order (digest {order_digest}, saved {saved}); NumPy was "
      f"{meta['versions'].get('numpy')}, is {versions()['numpy']}: install the version that the run was started with"
    )


def to_json(config: Config) -> dict[str, Any]:
  """The configuration as JSON has it (tuples become lists)."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def random_numbers(config: Config) -> dict[str, Any]:
  """What every random number of a run follows from, beside the step."""
  implementation = str(jax.config.jax_default_prng_impl)  # pyrefly: ignore[missing-attribute]: defined at run time
  return {"seed": config.seed, "implementation": implementation}


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
