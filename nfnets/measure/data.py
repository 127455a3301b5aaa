"""Measures how fast images are made ready on the host, by this library and by tf.data over the same records.

    from nfnets.measure import data
    jobs = data.measurements(data_config, batch=64, images=4000, threads=2)
    print(data.compare(jobs, rounds=3).to_json())

What keeps the figures honest: every measurement runs in a fresh process (`python -m nfnets.measure.data`, which reads a job as
JSON from stdin and prints the result as its last line); the pipelines take turns, round after round; each makes an exact number
of batches and no more, so that no half-made batch is left uncounted at either end; and its CPU time is that of all threads of its
process, from the moment it is set up to its last batch. Imports and setting up (the index or the graph, once a run) have columns
of their own.
"""

import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from nfnets.config import DataConfig
from nfnets.data.errors import DataError
from nfnets.measure.data_report import CROP, OURS, RECIPE, DataReport, Measured, Measurement


def measurements(
  config: DataConfig, *, batch: int, images: int, threads: int, seed: int = 0, against: bool = False
) -> list[Measurement]:
  """Returns the measurements to make: nfnets with the configured recipe and, if that does more, with decode, crop and flip alone.

  Args:
    config: the data, with image sizes and RandAugment filled in (`nfnets.train.resolve`).
    batch: images a batch.
    images: how many images each pipeline makes, rounded up to whole batches.
    threads: threads that decode.
    seed: of the order of the images and their augmentation.
    against: also measure tf.data's two pipelines; the one with the official structure only where the recipe is the official one.

  Raises:
    DataError: tf.data's pipelines cannot do what the configuration asks for.
  """
  plain = dataclasses.replace(config, mix="none", augment="none", repeats=1, shift=0)
  if against:
    if config.train_crop != "inception":
      raise DataError(
        f"tf.data's pipelines crop as train_crop='inception' does, got config.data.train_crop={config.train_crop!r}"
      )
    if batch % 2:
      raise DataError(f"batch={batch}: mixup and cutmix on half a batch each need an even number")
    plain = dataclasses.replace(plain, flip=True)
  make = lambda pipeline, group, data: Measurement(
    pipeline=pipeline,
    group=group,
    data=dataclasses.replace(data, threads=threads),
    batch=batch,
    steps=-(-images // batch),
    threads=threads,
    seed=seed,
  )
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


def compare(
  jobs: Sequence[Measurement], *, rounds: int, progress: Callable[[int, Measurement, Measured | None], None] = lambda *event: None
) -> DataReport:
  """Measures every job `rounds` times, each time in a fresh process, in turn: A B C A B C …

  Args:
    jobs: what to measure.
    rounds: how often.
    progress: is called with (number of the round from 0, job, None) before a measurement and with its result after it.

  Raises:
    DataError: as `measure_apart`.
  """
  results: list[list[Measured]] = [[] for _ in jobs]
  for number in range(rounds):
    for job, measured in zip(jobs, results, strict=True):
      progress(number, job, None)
      measured.append(measure_apart(job))
      progress(number, job, measured[-1])
  return DataReport(jobs=tuple(jobs), results=tuple(map(tuple, results)))


def measure_apart(job: Measurement) -> Measured:
  """Measures in a fresh process.

  Raises:
    DataError: the data cannot be read.
    RuntimeError: the process failed; the message ends with its stderr.
  """
  root = str(pathlib.Path(__file__).parents[2])
  path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
  quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "NO_GCE_CHECK": "true"}
  child = subprocess.run(
    [sys.executable, "-m", "nfnets.measure.data"],
    input=job.to_json(),
    capture_output=True,
    text=True,
    env={**os.environ, **quiet, "PYTHONPATH": path},
    check=False,
  )
  if child.returncode or not child.stdout.strip():
    raise RuntimeError(f"measuring {job.pipeline} ({job.group}) ended with status {child.returncode}:\n{child.stderr[-4000:]}")
  answer = json.loads(child.stdout.splitlines()[-1])
  if "error" in answer:
    raise DataError(answer["error"])
  return Measured(**answer)


def measure(job: Measurement) -> Measured:
  """Measures in this process, which should be a fresh one, because memory and imports count from its start."""
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
  return Measured(
    images=images,
    batch_bytes=batch_bytes,
    import_s=import_s,
    setup_s=setup_s,
    setup_cpu_s=setup_cpu_s,
    first_batch_s=first_batch_s,
    wall_s=wall_s,
    cpu_s=cpu_s,
    peak_bytes=peak,
    imported_bytes=imported,
    times=times,
    versions=versions,
  )


def _preload(job: Measurement) -> dict[str, str]:
  """Imports what the pipeline needs; returns the versions of the packages that do its work."""
  if job.pipeline != OURS:
    from nfnets.measure import tfdata

    return tfdata.preload()
  import cv2
  import simplejpeg

  from nfnets.data.sources.open import open_source  # noqa: F401  (imported so that its time and memory count)

  if job.data.name not in ("digits", "synthetic", "folder"):
    import tensorflow_datasets  # noqa: F401  (a TFDS source imports it when it is opened)
  return {"numpy": np.__version__, "opencv": cv2.__version__, "simplejpeg": simplejpeg.__version__}


def _open(job: Measurement) -> tuple[Iterator[dict[str, Any]], dict[str, float], Callable[[], None]]:
  """Returns (batches, seconds by phase, which grow as batches are made, and a function that closes the pipeline)."""
  if job.pipeline != OURS:
    from nfnets.measure import tfdata

    build = tfdata.tuned if job.group == CROP else tfdata.official
    dataset = build(job.data, batch=job.batch, steps=job.steps, threads=job.threads)
    return iter(dataset.as_numpy_iterator()), {}, lambda: None
  from nfnets.data.batches.prefetch import prefetch
  from nfnets.data.batches.training import TrainBatches
  from nfnets.data.sources.open import open_source

  source = open_source(job.data, job.data.train_split, progress=lambda line: None)
  batches = TrainBatches(source, job.data, batch=job.batch, seed=job.seed)

  def close():
    batches.close()
    source.close()

  return prefetch(batches.start, 0, job.steps), batches.times, close


def _resident() -> dict[str, int]:
  """Returns the bytes of this process that are resident now ("VmRSS") and the most that were so far ("VmHWM")."""
  # getrusage's maximum is only used where /proc is missing, because on Linux a child starts with its parent's maximum.
  try:
    lines = pathlib.Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
  except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"VmRSS": peak, "VmHWM": peak}
  fields = dict(line.split(":", 1) for line in lines if ":" in line)
  return {name: 1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM")}


def main() -> None:
  """Measures the job that stdin holds as JSON, and prints the result, or {"error": …}, as JSON."""
  try:
    answer = dataclasses.asdict(measure(Measurement.from_json(sys.stdin.read())))
  except DataError as error:
    answer = {"error": str(error)}
  print(f"\n{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
  main()
