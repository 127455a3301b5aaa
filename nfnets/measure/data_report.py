"""Holds the measurements of the data path's benchmark, and makes their ratios, table and JSON."""

import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nfnets.config import DataConfig
from nfnets.data.batches.prefetch import cores

if TYPE_CHECKING:  # measured processes import this module, and their memory and imports count
  import rich.table

CROP, RECIPE = "decode + crop + flip", "whole recipe"  # the groups of pipelines that do the same work
OURS = "nfnets"
PHASES = ("read", "check", "decode", "augment", "mix")
# The peers: pipeline → (its group, the ratio of images per CPU-second that ours should reach against it).
PEERS = {"tf.data, tuned": (CROP, 1.15), "tf.data, official structure": (RECIPE, 5.0)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
  """Describes a measurement: `steps` batches of `batch` images by `pipeline` (OURS or a key of PEERS), `threads` threads."""

  pipeline: str
  group: str
  data: DataConfig
  batch: int
  steps: int
  threads: int
  seed: int = 0

  def to_json(self) -> str:
    """Writes it for the process that measures."""
    return json.dumps(dataclasses.asdict(self))

  @classmethod
  def from_json(cls, text: str) -> "Measurement":
    """Reads what `to_json` wrote."""
    fields: dict[str, Any] = json.loads(text)
    data: dict[str, Any] = {
      name: tuple(value) if isinstance(value, list) else value for name, value in fields.pop("data").items()
    }
    return cls(data=DataConfig(**data), **fields)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
  """Holds what one process measured: seconds of the wall, or of the CPU (user + system, all threads of the process)."""

  images: int
  batch_bytes: int
  import_s: float
  setup_s: float  # opening the source or building the graph, up to the request for the first batch
  setup_cpu_s: float
  first_batch_s: float  # setup_s included
  wall_s: float  # from the end of setting up to the last batch
  cpu_s: float
  peak_bytes: int  # resident, of the whole process
  imported_bytes: int  # resident after the imports
  times: dict[str, float]  # seconds that ours spent on each of PHASES, summed over its threads
  versions: dict[str, str]

  @property
  def figures(self) -> dict[str, float]:
    """The speeds, times and bytes that are compared."""
    return {
      "images_per_s": self.images / self.wall_s,
      "images_per_cpu_s": self.images / self.cpu_s,
      "first_batch_s": self.first_batch_s,
      "import_s": self.import_s,
      "setup_cpu_s": self.setup_cpu_s,
      "peak_bytes": self.peak_bytes,
      "own_bytes": self.peak_bytes - self.imported_bytes,
    }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
  """Holds our images per CPU-second over a peer's: of the medians, of each round, and the wanted ratio."""

  group: str
  peer: str
  ratio: float
  rounds: tuple[float, ...]
  wanted: float

  @classmethod
  def of(cls, group: str, peer: str, ours: Sequence[float], theirs: Sequence[float], wanted: float) -> "Ratio":
    """Divides our images per CPU-second by theirs, one of each a round."""
    return cls(
      group=group,
      peer=peer,
      ratio=statistics.median(ours) / statistics.median(theirs),
      wanted=wanted,
      rounds=tuple(our / their for our, their in zip(ours, theirs, strict=True)),
    )

  def __str__(self) -> str:
    return (
      f"{self.group}: {self.ratio:.2f} × the images per CPU-second of {self.peer} "
      f"({min(self.rounds):.2f} to {max(self.rounds):.2f} by rounds; wanted at least {self.wanted:g})"
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
  """Holds the jobs and, in the same order, the results of each over the rounds."""

  jobs: tuple[Measurement, ...]
  results: tuple[tuple[Measured, ...], ...]

  def medians(self, index: int) -> dict[str, float]:
    """Computes the median over the rounds of each figure of job `index`."""
    rounds = [result.figures for result in self.results[index]]
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}

  def shares(self, index: int) -> dict[str, float]:
    """Computes the part of its threads' work that job `index` spent on each phase, over all rounds; empty for peers."""
    totals: dict[str, float] = {}
    for result in self.results[index]:
      for name, seconds in result.times.items():
        totals[name] = totals.get(name, 0.0) + seconds
    whole = sum(totals.values())
    return {name: seconds / whole for name, seconds in totals.items()} if whole else {}

  @property
  def ratios(self) -> list[Ratio]:
    """The ratios of our speed to that of each peer in the same group."""
    speeds = lambda index: [result.figures["images_per_cpu_s"] for result in self.results[index]]
    ours = {job.group: index for index, job in enumerate(self.jobs) if job.pipeline == OURS}
    return [
      Ratio.of(job.group, job.pipeline, speeds(ours[job.group]), speeds(index), PEERS[job.pipeline][1])
      for index, job in enumerate(self.jobs)
      if job.pipeline in PEERS
    ]

  def to_json(self) -> dict[str, Any]:
    """Returns the settings and all figures, ready for json.dumps."""
    rows = [
      {
        "pipeline": job.pipeline,
        "group": job.group,
        **self.medians(index),
        "shares": self.shares(index),
        "rounds": [dataclasses.asdict(result) for result in self.results[index]],
      }
      for index, job in enumerate(self.jobs)
    ]
    job = self.jobs[-1]
    return {
      "benchmark": "data",
      "data": dataclasses.asdict(job.data),
      "batch": job.batch,
      "images": job.batch * job.steps,
      "threads": job.threads,
      "cores": cores(),
      "python": platform.python_version(),
      "machine": platform.machine(),
      "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
      "rows": rows,
      "ratios": [dataclasses.asdict(ratio) for ratio in self.ratios],
    }

  def table(self) -> "rich.table.Table":
    """Makes a table with a section for each group."""
    import rich.box
    import rich.table

    job, rounds = self.jobs[-1], len(self.results[0])
    table = rich.table.Table(
      box=rich.box.SIMPLE_HEAD,
      caption_justify="left",
      caption_style="",
      caption=(
        f"{job.batch * job.steps:,} images in batches of {job.batch} ({_mb(self.results[0][0].batch_bytes)} uint8), "
        f"{job.threads} thread{'s' * (job.threads > 1)} on {cores()} core{'s' * (cores() > 1)}; medians of {rounds} "
        f"round{'s' * (rounds > 1)}. CPU-seconds: user + system of all threads, imports and setting up left out; first batch: "
        "from opening the source, imports left out; memory: peak resident, and above what it was after the imports."
      ),
    )
    table.add_column("pipeline", no_wrap=True)
    for name in ("images/s", "images per CPU-s", "first batch s", "import s", "memory MB", "own MB"):
      table.add_column(name, justify="right")
    table.add_column(" / ".join(PHASES) + ", %", justify="right")
    for group in dict.fromkeys(job.group for job in self.jobs):
      table.add_section()
      table.add_row(f"[bold]{group}")
      for index, job in enumerate(self.jobs):
        if job.group != group:
          continue
        medians, shares = self.medians(index), self.shares(index)
        parts = " / ".join(f"{100 * shares[name]:.0f}" for name in PHASES) if shares else "–"
        table.add_row(
          f"  {job.pipeline}",
          f"{medians['images_per_s']:,.0f}",
          f"{medians['images_per_cpu_s']:,.0f}",
          f"{medians['first_batch_s']:.2f}",
          f"{medians['import_s']:.2f}",
          f"{medians['peak_bytes'] / 1e6:,.0f}",
          f"{medians['own_bytes'] / 1e6:,.0f}",
          parts,
        )
    return table


def _mb(count: int) -> str:
  return f"{count / 1e6:,.1f} MB"
