"""Times our training step beside a peer's, on one device of this machine: timm's in PyTorch, or the official release's in Haiku.

    from nfnets.measure import peers
    print(peers.compare(config, "timm", rounds=3, steps=50, warmup=5))

What keeps the figures honest: both sides do the same work on the same noise (see `check_same_work`), which a test of one step's
updated parameters shows; each side, ours too, has a process of its own; both stay ready and take turns, round after round, so
that a machine that grows slower grows slower for both; a turn begins with a step that is not timed, and its steps are waited for
at the end of each block only, as training runs; and there is a report only if both losses are finite, both sides have as many
parameters, and both ran on the same kind of device.
"""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import importlib.util
import math
import os
import pathlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from nfnets import models, optim
from nfnets.config import Config
from nfnets.data.batches.prefetch import cores
from nfnets.errors import UserError
from nfnets.measure import program
from nfnets.measure.chips import cpu_name
from nfnets.measure.peers_report import PeerReport, SideReport
from nfnets.measure.turns import MissingPackage, Side, SideError
from nfnets.models import registry
from nfnets.models.nf_resnet import NFResNetConfig
from nfnets.train.checkpoints.compatibility import to_json
from nfnets.weights import haiku, timm, writer

PEERS = {"timm": ("torch", "timm"), "haiku": ("haiku", "tree", "dill")}  # the packages that each imports
INSTALL = {"timm": "pip install torch torchvision timm", "haiku": "pip install dm-haiku dm-tree dill"}
RELEASE = ("nfnet_f", "nf_resnet", "nf_regnet_b")  # families of the release whose steps are compared
# What a peer's step does not do, or does otherwise: fields of the configuration and the only value that they may have.
ONLY: dict[str, Any] = {
  "loss": "softmax",
  "accumulate": 1,
  "model.remat": False,
  "optim.name": "sgd",
  "optim.sam_rho": 0.0,
  "optim.layer_decay": 1.0,
  "optim.frozen": (),
  "optim.agc_exclude": (),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Match:
  """A peer's network that computes what ours does.

  Attributes:
    overrides: fields of our row to set, so that ours computes what theirs does.
    words: how ours was fitted to theirs.
    job: what the peer's process is to build.
  """

  overrides: dict[str, Any]
  words: str
  job: dict[str, Any]


def compare(
  config: Config,
  peer: str,
  *,
  rounds: int = 3,
  steps: int = 50,
  warmup: int = 5,
  official: str | None = None,
  torch_compile: bool = False,
  torch_contiguous: bool = False,
  together: bool = False,
  kept: str | None = None,
  say: Callable[[str], None] = lambda line: None,
) -> PeerReport:
  """Times our step and a peer's in turn.

  Args:
    config: the run; `batch` is on one device. AGC's tracking and the mixing of images are left out, which peers have not.
    peer: "timm" or "haiku".
    rounds: turns of each side.
    steps: timed steps a turn.
    warmup: steps of each side before the first turn.
    official: for "haiku", the directory that holds the release's nfnets/.
    torch_compile: for "timm", lets torch.compile compile the network.
    torch_contiguous: for "timm" on a GPU, leaves channels first in memory, instead of last.
    together: starts both sides at the same time, which is sooner done but spoils the times of building and compiling.
    kept: a directory for our compiled programs; a second comparison of the same step reads it.
    say: gets a line as each phase begins.

  Raises:
    UserError: a package is missing, the peer has no such network, the configuration asks for what the peer does not do, the
      device has too little memory, or the sides turn out to be no match.
  """
  config.validate()
  check_installed(peer)
  check_same_work(config)
  match = timm_network(config) if peer == "timm" else haiku_network(config, official)
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, overrides={**config.model.overrides, **match.overrides}, activation=None),
    optim=dataclasses.replace(config.optim, agc_track=False),
  )
  size = config.data.image_size or models.variant(config.model.name).train_resolution
  classes, source = program.class_count(config)
  say(f"{classes} classes, {source}; {config.model.name}: {match.words}")
  theirs = {
    **work(config, size=size, classes=classes),
    **match.job,
    "compile": torch_compile,
    "contiguous": torch_contiguous,
    "weights": "",
  }
  ours = {"config": to_json(config), "size": size, "classes": classes}
  with started(peer, theirs, ours, say, together=together, kept=kept) as (our_side, their_side):
    check_match(our_side.facts, their_side.facts, peer)
    our_s, their_s = take_turns(our_side, their_side, rounds=rounds, steps=steps, warmup=warmup, say=say)
    sides = [
      SideReport.of(side.facts, side.start_s, seconds, side.loss(), batch=config.batch)
      for side, seconds in ((our_side, our_s), (their_side, their_s))
    ]
  return PeerReport(
    peer=peer,
    model=config.model.name,
    overrides=config.model.all_overrides(),
    dialect=match.words,
    dtype=config.model.dtype,
    num_classes=classes,
    image_size=size,
    batch=config.batch,
    clipping=clipping(config),
    ema_decay=config.optim.ema_decay,
    rounds=rounds,
    steps=steps,
    warmup_steps=warmup,
    cpu=cpu_name(),
    cores=cores(),
    date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    ours=sides[0],
    theirs=sides[1],
  )


def take_turns(
  ours: Side, theirs: Side, *, rounds: int, steps: int, warmup: int, say: Callable[[str], None] = lambda line: None
) -> tuple[list[list[float]], list[list[float]]]:
  """Lets both sides time `steps` steps in each round, ours first; returns seconds a step by round and block, of each side."""
  ours.seconds(warmup)
  theirs.seconds(warmup)
  seconds: tuple[list[list[float]], list[list[float]]] = ([], [])
  for number in range(1, rounds + 1):
    for side, timed in zip((ours, theirs), seconds, strict=True):
      timed.append(side.seconds(steps, untimed=1))
      say(f"round {number}/{rounds}  {side.name}: {1e3 * statistics.median(timed[-1]):.4g} ms a step")
  return seconds


@contextlib.contextmanager
def started(
  peer: str,
  theirs: dict[str, Any],
  ours: dict[str, Any],
  say: Callable[[str], None],
  *,
  together: bool = False,
  kept: str | None = None,
) -> Iterator[tuple[Side, Side]]:
  """Starts both sides, the peer first, because what is missing there is seen at once, or both at the same time.

  Raises:
    UserError: what their processes say.
  """
  here = pathlib.Path(__file__).parent
  starts = [
    lambda: Side(peer, str(here / f"peer_{peer}.py"), theirs, environment=shared_gpu()),
    lambda: Side("nfnets", str(here / "peer_ours.py"), ours, environment=our_environment(kept)),
  ]
  with contextlib.ExitStack() as opened, explained():
    if together:
      say(f"{peer} and nfnets: starting, building, compiling")
      with concurrent.futures.ThreadPoolExecutor(len(starts)) as pool:
        sides = [pool.submit(start) for start in starts]
      for side in sides:
        if side.exception() is None:
          opened.enter_context(side.result())
      yield sides[1].result(), sides[0].result()
    else:
      say(f"{peer}: starting, building")
      their_side = opened.enter_context(starts[0]())
      say("nfnets: starting, building, compiling")
      yield opened.enter_context(starts[1]()), their_side


@contextlib.contextmanager
def explained() -> Iterator[None]:
  """Turns what a side's process says into a UserError."""
  try:
    yield
  except MissingPackage as error:
    side, package = error.args
    raise UserError(f"{package} is not installed, which --peer={side} needs: {INSTALL.get(side, package)}") from error
  except SideError as error:
    raise UserError(str(error)) from error


def shared_gpu() -> dict[str, str]:
  """The environment of processes that share one GPU: none may take most of its memory before it needs it."""
  return {"XLA_PYTHON_CLIENT_PREALLOCATE": os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "false")}


def our_environment(kept: str | None = None) -> dict[str, str]:
  """The same of a process that imports this package; compiled programs are kept in the directory `kept`."""
  path = os.pathsep.join(filter(None, (str(pathlib.Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
  return {**shared_gpu(), "PYTHONPATH": path, **({"JAX_COMPILATION_CACHE_DIR": kept} if kept else {})}


# ---- what is compared


def check_installed(peer: str) -> None:
  """Raises UserError where a package of the peer is missing, without importing it."""
  for package in PEERS[peer]:
    if importlib.util.find_spec(package) is None:
      raise UserError(f"{package} is not installed, which --peer={peer} needs: {INSTALL[peer]}")


def check_same_work(config: Config) -> None:
  """Raises UserError where the configuration asks for a step that the peers do not take."""
  for field, only in ONLY.items():
    value: Any = config
    for name in field.split("."):
      value = getattr(value, name)
    if value != only:
      raise UserError(f"config.{field}={value!r}: a peer's step is compared with config.{field}={only!r} alone")
  if config.optim.momentum == 0:
    raise UserError("config.optim.momentum=0: a peer's step is compared with momentum alone, as published 0.9")


def check_match(ours: dict[str, Any], theirs: dict[str, Any], peer: str) -> None:
  """Raises UserError where the two sides turn out to be different networks, or on different kinds of device."""
  if ours["parameters"] != theirs["parameters"]:
    raise UserError(f"--peer={peer} has another network: {theirs['parameters']:,} parameters, ours {ours['parameters']:,}")
  if (ours["device"] == "cpu") != (theirs["device"] == "cpu"):
    raise UserError(
      f"ours runs on {ours['device']} and --peer={peer} on {theirs['device']}; install both for the same device, or hide the "
      "GPU from both with CUDA_VISIBLE_DEVICES=-1 JAX_PLATFORMS=cpu"
    )


def work(config: Config, *, size: int, classes: int) -> dict[str, Any]:
  """Returns what a step does, for a peer's process."""
  optimizer = config.optim
  return {
    "seed": config.seed,
    "batch": config.batch,
    "size": size,
    "classes": classes,
    "mean": list(config.data.mean),
    "std": list(config.data.std),
    "dtype": config.model.dtype,
    "label_smoothing": config.label_smoothing,
    # The warm-up is as in our schedule; its cosine moves nothing within the steps of a benchmark
    "learning_rate": optim.peak_lr(optimizer, config.batch),
    "warmup_steps": optimizer.warmup_epochs * program.IMAGENET_IMAGES / config.batch,
    "momentum": optimizer.momentum,
    "nesterov": optimizer.nesterov is not False,
    "weight_decay": optimizer.weight_decay,
    "clipping": clipping(config),
    "agc_eps": optimizer.agc_eps,
    "ema_decay": optimizer.ema_decay,
  }


def clipping(config: Config) -> float | None:
  """Returns AGC's lambda; None where nothing is clipped."""
  strength = config.optim.clipping
  return None if strength is None or strength == math.inf else strength


def timm_network(config: Config) -> Match:
  """Finds timm's network for ours: the same one, else the one that is the same in timm's dialect.

  Raises:
    UserError: timm has none.
  """
  name, overrides = registry.variant_name(config.model.name), config.model.all_overrides()
  row: Any = models.variant(name, **overrides)
  rates = {"drop_rate": row.drop_rate, "drop_path_rate": row.stochastic_depth}
  named = {theirs: known for theirs, known in timm.ARCHITECTURES.items() if known.name == name}
  for theirs, known in named.items():
    agrees = all(overrides.get(field, value) == value for field, value in known.overrides.items())
    published = models.variant(name, **known.overrides)
    if agrees and writer.same_network(models.variant(name, **{**overrides, **known.overrides}), published):
      same = writer.same_network(row, published)
      words = "as the recipe says" if same else f"in timm's dialect {row_words(known.overrides)}"
      job = {"network": theirs, "overrides": rates}
      return Match(overrides=known.overrides, words=f"{words}, which is timm's {theirs}", job=job)
  if not named and "norm" not in overrides and isinstance(row, NFResNetConfig) and (built := _of_timms_blocks(row)):
    job = {"network": "NormFreeNet", "built": built, "overrides": rates}
    return Match(overrides={"dialect": "timm"}, words="in timm's dialect, built of timm's blocks", job=job)
  changed = f" with {row_words(overrides)}" if named else ""
  have = ", ".join(dict.fromkeys(known.name for known in timm.ARCHITECTURES.values()))
  raise UserError(f"timm has no equal of {name}{changed}; it has {have}")


def _of_timms_blocks(row: NFResNetConfig) -> dict[str, Any] | None:
  """timm's settings of an NF-ResNet for small images: a stem of 3×3, whose pool `peer_timm` takes away; None for another one."""
  fits = (3, 2, False, (1, *[2] * (len(row.depth) - 1)), None)
  if (row.stem_kernel, row.stem_strides, row.stem_pool, row.stage_strides, row.gate) != fits:
    return None
  blocks = {"depths": row.depth, "channels": row.width, "alpha": row.alpha, "bottle_ratio": row.bottleneck}
  return {**blocks, "stem_type": "3x3_pool", "stem_chs": row.width[0] // 4, "act_layer": row.activation}


def haiku_network(config: Config, official: str | None) -> Match:
  """Finds the release's network for ours.

  Raises:
    UserError: the release has none, or does not lie in the directory `official`.
  """
  if official is None:
    raise UserError("--peer=haiku needs --official=DIR, the directory that holds nfnets/ of google-deepmind/deepmind-research")
  if not (pathlib.Path(official) / "nfnets" / "nfnet.py").is_file():
    raise UserError(f"--official={official}: no nfnets/nfnet.py in it; expected a copy of google-deepmind/deepmind-research")
  name, overrides = registry.variant_name(config.model.name), config.model.all_overrides()
  row: Any = models.variant(name, **overrides)
  family, variant = haiku.family_of(name), haiku.variant_of(name)
  if family and variant and family.prefix in RELEASE and writer.same_network(row, models.variant(name)):
    settings = {"drop_rate": row.drop_rate, "stochdepth_rate": row.stochastic_depth, "activation": row.activation}
    job = {"official": str(pathlib.Path(official).resolve()), "module": family.module, "class": family.network}
    return Match(overrides={}, words="as the recipe says", job={**job, "overrides": {**settings, "variant": variant}})
  changed = f" with {row_words(overrides)}" if overrides else ""
  raise UserError(
    f"the release has no equal of {name}{changed}; it has nfnet_f0 to nfnet_f7+, nf_resnet50 to nf_resnet600, nf_regnet_b0 to b8"
  )


def row_words(overrides: dict[str, Any]) -> str:
  """Lists fields of a row with their values."""
  return ", ".join(f"{name}={value!r}" for name, value in overrides.items())
