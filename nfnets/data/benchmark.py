"""How fast images are made ready on the host: ours, and tf.data's pipelines over the same records, side by side.

    from nfnets.data import benchmark
    print(benchmark.compare(benchmark.plan(config, batch=64, images=4000, threads=2), rounds=3))

What keeps the figures honest: every measurement is a fresh process (`python -m nfnets.data.benchmark`, a job as JSON on
stdin, the result as the last line of stdout); the pipelines take turns, round after round; each makes an exact number of
batches and no more, so that nothing half done is left uncounted at either end; and its CPU time is that of all threads of
its process, from the moment it is set up to its last batch. Imports and setting up (index or graph, once a run) have
columns of their own.
"""
import dataclasses
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from nfnets.config import DataConfig
from nfnets.data.errors import DataError
from nfnets.data.pool import cores

CROP, RECIPE = "decode + crop + flip", "whole recipe"
OURS = "nfnets"
PHASES = ("read", "decode", "augment", "mix")
# pipeline -> (group, how many times its images per CPU-second ours should reach)
PEERS = {"tf.data, tuned": (CROP, 1.15), "tf.data, official structure": (RECIPE, 5.0)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
  """One measurement: `steps` batches of `batch` images by `pipeline` (OURS or a key of PEERS) with `threads` threads."""

  pipeline: str
  group: str
  data: DataConfig
  batch: int
  steps: int
  threads: int
  seed: int = 0

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self))

  @classmethod
  def from_json(cls, text: str) -> "Job":
    fields = json.loads(text)
    data = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.pop("data").items()}
    return cls(data=DataConfig(**data), **fields)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
  """What one process measured. Seconds are of the wall, or of the CPU (user + system, all threads of the process)."""

  images: int
  batch_bytes: int
  import_s: float
  setup_s: float  # opening the source or building the graph, until the first batch can be asked for
  setup_cpu_s: float
  first_batch_s: float  # setup_s included
  wall_s: float  # from set up to the last batch
  cpu_s: float
  peak_bytes: int  # resident, of the whole process
  imported_bytes: int  # resident after the imports
  times: dict[str, float]  # seconds that ours spent on read, decode, augment, mix, summed over its threads
  versions: dict[str, str]

  @property
  def figures(self) -> dict[str, float]:
    return {"images_per_s": self.images / self.wall_s, "images_per_cpu_s": self.images / self.cpu_s,
            "first_batch_s": self.first_batch_s, "import_s": self.import_s, "setup_cpu_s": self.setup_cpu_s,
            "peak_bytes": self.peak_bytes, "own_bytes": self.peak_bytes - self.imported_bytes}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
  """Ours over a peer's images per CPU-second: of the medians, and of each round."""

  group: str
  peer: str
  ratio: float
  rounds: tuple[float, ...]
  wanted: float

  @classmethod
  def of(cls, group: str, peer: str, ours: Sequence[float], theirs: Sequence[float], wanted: float) -> "Ratio":
    return cls(group=group, peer=peer, ratio=statistics.median(ours) / statistics.median(theirs), wanted=wanted,
               rounds=tuple(a / b for a, b in zip(ours, theirs, strict=True)))

  def __str__(self) -> str:
    return (f"{self.group}: {self.ratio:.2f} × the images per CPU-second of {self.peer} "
            f"({min(self.rounds):.2f} to {max(self.rounds):.2f} by rounds; wanted at least {self.wanted:g})")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
  """Jobs and, in the same order, the results of each over the rounds."""

  jobs: tuple[Job, ...]
  results: tuple[tuple[Result, ...], ...]

  def medians(self, index: int) -> dict[str, float]:
    """Median over the rounds of each figure."""
    rounds = [result.figures for result in self.results[index]]
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}

  def shares(self, index: int) -> dict[str, float]:
    """Part of its threads' work that ours spent on each phase, over all rounds; empty for others."""
    totals: dict[str, float] = {}
    for result in self.results[index]:
      for name, seconds in result.times.items():
        totals[name] = totals.get(name, 0.0) + seconds
    whole = sum(totals.values())
    return {name: seconds / whole for name, seconds in totals.items()} if whole else {}

  @property
  def ratios(self) -> list[Ratio]:
    speeds = lambda index: [result.figures["images_per_cpu_s"] for result in self.results[index]]
    ours = {job.group: index for index, job in enumerate(self.jobs) if job.pipeline == OURS}
    return [Ratio.of(job.group, job.pipeline, speeds(ours[job.group]), speeds(index), PEERS[job.pipeline][1])
            for index, job in enumerate(self.jobs) if job.pipeline in PEERS]

  def to_json(self) -> dict[str, Any]:
    rows = [{"pipeline": job.pipeline, "group": job.group, **self.medians(index), "shares": self.shares(index),
             "rounds": [dataclasses.asdict(result) for result in self.results[index]]} for index, job in enumerate(self.jobs)]
    job = self.jobs[-1]
    return {"benchmark": "data", "data": dataclasses.asdict(job.data), "batch": job.batch, "images": job.batch * job.steps,
            "threads": job.threads, "cores": cores(), "python": platform.python_version(), "machine": platform.machine(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()), "rows": rows,
            "ratios": [dataclasses.asdict(ratio) for ratio in self.ratios]}

  def table(self):
    """A rich table, a section a group."""
    import rich.box
    import rich.table
    job, rounds = self.jobs[-1], len(self.results[0])
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, caption_justify="left", caption_style="", caption=(
        f"{job.batch * job.steps:,} images in batches of {job.batch} ({_mb(self.results[0][0].batch_bytes)} uint8), "
        f"{job.threads} thread{'s' * (job.threads > 1)} on {cores()} core{'s' * (cores() > 1)}; medians of {rounds} "
        f"round{'s' * (rounds > 1)}. CPU-seconds: user + system of all threads, imports and setting up left out; first batch: "
        "from opening the source, imports left out; memory: peak resident, and above what it was after the imports."))
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
        found, shares = self.medians(index), self.shares(index)
        parts = " / ".join(f"{100 * shares[name]:.0f}" for name in PHASES) if shares else "–"
        table.add_row(f"  {job.pipeline}", f"{found['images_per_s']:,.0f}", f"{found['images_per_cpu_s']:,.0f}",
                      f"{found['first_batch_s']:.2f}", f"{found['import_s']:.2f}", f"{found['peak_bytes'] / 1e6:,.0f}",
                      f"{found['own_bytes'] / 1e6:,.0f}", parts)
    return table


def plan(config: DataConfig, *, batch: int, images: int, threads: int, seed: int = 0, against: bool = False) -> list[Job]:
  """The jobs: ours with the configured recipe and, where that does more, with nothing beyond decode, crop and flip.

  Args:
    config: sizes and RandAugment filled in.
    images: how many each makes; rounded up to whole batches.
    against: also tf.data's two; the one with the official structure only where the recipe is the one that it has.
  """
  plain = dataclasses.replace(config, mix="none", augment="none", repeats=1, shift=0)
  if against:
    if config.train_crop != "inception":
      raise DataError("tf.data's pipelines crop as train_crop='inception' does, got config.data.train_crop="
                      f"{config.train_crop!r}")
    if batch % 2:
      raise DataError(f"batch={batch}: mixup and cutmix on half a batch each need an even number")
    plain = dataclasses.replace(plain, flip=True)
  make = lambda pipeline, group, data: Job(pipeline=pipeline, group=group, data=dataclasses.replace(data, threads=threads),
                                           batch=batch, steps=-(-images // batch), threads=threads, seed=seed)
  jobs = []
  if against or plain != config:
    jobs.append(make(OURS, CROP, plain))
  if against:
    jobs.append(make("tf.data, tuned", CROP, plain))
  if plain != config or not jobs:
    jobs.append(make(OURS, RECIPE, config))
  if against and (config.mix, config.augment, config.augment_before_mix) == ("mixup_cutmix", "randaugment", False):
    jobs.append(make("tf.data, official structure", RECIPE, config))
  return jobs


def compare(jobs: Sequence[Job], *, rounds: int,
            progress: Callable[[int, Job, Result | None], None] = lambda *what: None) -> DataReport:
  """Measures every job `rounds` times, each in its own process, in turn: A B C A B C …

  progress: called with (round from 0, job, None) before a measurement and with its result after it.
  """
  results: list[list[Result]] = [[] for _ in jobs]
  for number in range(rounds):
    for job, found in zip(jobs, results, strict=True):
      progress(number, job, None)
      found.append(measure_apart(job))
      progress(number, job, found[-1])
  return DataReport(jobs=tuple(jobs), results=tuple(map(tuple, results)))


def measure_apart(job: Job) -> Result:
  """Measures in a fresh process. DataError as there; RuntimeError with its stderr if it broke."""
  root = str(pathlib.Path(__file__).parents[2])
  path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
  quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "NO_GCE_CHECK": "true"}
  child = subprocess.run([sys.executable, "-m", "nfnets.data.benchmark"], input=job.to_json(), capture_output=True, text=True,
                         env={**os.environ, **quiet, "PYTHONPATH": path}, check=False)
  if child.returncode or not child.stdout.strip():
    raise RuntimeError(f"measuring {job.pipeline} ({job.group}) ended with status {child.returncode}:\n{child.stderr[-4000:]}")
  found = json.loads(child.stdout.splitlines()[-1])
  if "error" in found:
    raise DataError(found["error"])
  return Result(**found)


def measure(job: Job) -> Result:
  """Measures in this process; meant for a fresh one, because memory and imports count from its start."""
  begin = time.perf_counter()
  versions = _preload(job)
  import_s = time.perf_counter() - begin
  imported = _resident()["VmRSS"]
  begin, cpu = time.perf_counter(), time.process_time()
  batches, times, close = _open(job)
  setup_s, setup_cpu_s = time.perf_counter() - begin, time.process_time() - cpu
  cpu, images, first_batch_s, batch_bytes = time.process_time(), 0, 0.0, 0
  for batch in batches:
    images += len(batch["label"])
    if not first_batch_s:
      first_batch_s, batch_bytes = time.perf_counter() - begin, sum(np.asarray(value).nbytes for value in batch.values())
  wall_s, cpu_s = time.perf_counter() - begin - setup_s, time.process_time() - cpu
  peak = _resident()["VmHWM"]
  times = dict(times)
  close()
  if images != job.batch * job.steps:
    raise RuntimeError(f"{job.pipeline} made {images} images, {job.batch * job.steps} were asked for")
  return Result(images=images, batch_bytes=batch_bytes, import_s=import_s, setup_s=setup_s, setup_cpu_s=setup_cpu_s,
                first_batch_s=first_batch_s, wall_s=wall_s, cpu_s=cpu_s, peak_bytes=peak, imported_bytes=imported, times=times,
                versions=versions)


def _preload(job: Job) -> dict[str, str]:
  if job.pipeline != OURS:
    from nfnets.data import peers
    return peers.preload()
  import cv2
  import simplejpeg

  from nfnets.data import loader, sources  # noqa: F401  (imported for their time and memory)
  if job.data.name not in ("digits", "synthetic", "folder"):
    import tensorflow_datasets  # noqa: F401  (what a TFDS source imports when it is opened)
  return {"numpy": np.__version__, "opencv": cv2.__version__, "simplejpeg": simplejpeg.__version__}


def _open(job: Job) -> tuple[Iterator[dict[str, Any]], dict[str, float], Callable[[], None]]:
  """(batches, seconds by phase that fill up as they are made, what to call at the end)."""
  if job.pipeline != OURS:
    from nfnets.data import peers
    build = peers.tuned if job.group == CROP else peers.official
    found = build(job.data, batch=job.batch, steps=job.steps, threads=job.threads)
    return iter(found.as_numpy_iterator()), {}, lambda: None
  from nfnets.data import loader, pool, sources
  source = sources.load(job.data, train=True, progress=lambda line: None)
  batches = loader.TrainBatches(source, job.data, batch=job.batch, seed=job.seed)

  def close():
    batches.close()
    source.close()

  return pool.prefetch(batches.start, 0, job.steps), batches.times, close


def _resident() -> dict[str, int]:
  """Bytes resident now (VmRSS) and at most so far (VmHWM)."""
  # Not getrusage's maximum where it can be helped: on Linux a child starts with its parent's.
  try:
    lines = pathlib.Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
  except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"VmRSS": peak, "VmHWM": peak}
  fields = dict(line.split(":", 1) for line in lines if ":" in line)
  return {name: 1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM")}


def _mb(count: int) -> str:
  return f"{count / 1e6:,.1f} MB"


def main() -> None:
  try:
    found = dataclasses.asdict(measure(Job.from_json(sys.stdin.read())))
  except DataError as error:
    found = {"error": str(error)}
  print(f"\n{json.dumps(found)}", flush=True)


if __name__ == "__main__":
  main()
