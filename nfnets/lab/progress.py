"""How far an experiment is, and its parts: done one a core, and kept one by one so that a run that is stopped goes on."""

import concurrent.futures
import json
import pathlib
import random
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax

from nfnets.data.batches.prefetch import cores


class Progress:
  """Hears from an experiment how far it is, and does its independent parts, each of which is kept as soon as it is done.

  Args:
    tell: is called with the share that is done, 0 to 1.
    file: where values of parts are kept, a line of JSON each, and read from; None: nowhere.
  """

  def __init__(self, tell: Callable[[float], None], file: pathlib.Path | None = None):
    self._tell, self._file, self._writing = tell, file, threading.Lock()

  def __call__(self, share: float) -> None:
    self._tell(share)

  def parts(self, jobs: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Computes {name: value} of all jobs; a value that the file holds is not computed again.

    On CPUs several jobs run at once, one a core, since networks of this size keep no more busy. Values must be such that JSON
    can hold them.
    """
    values = {name: value for name, value in self._kept().items() if name in jobs}
    left, workers = [name for name in jobs if name not in values], cores() if jax.default_backend() == "cpu" else 1
    random.Random(0).shuffle(left)  # neighbours often share a program, which two threads would both compile

    def work(name: str) -> tuple[str, Any]:
      value = jobs[name]()
      if self._file is not None:
        with self._writing, self._file.open("a", encoding="utf-8") as file:
          file.write("\n" + json.dumps({"part": name, "value": value}))  # first the end of a line that a killed run left
      return name, value

    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
      for done in concurrent.futures.as_completed([pool.submit(work, name) for name in left]):
        values.update([done.result()])
        self(len(values) / len(jobs))
    finally:
      pool.shutdown(cancel_futures=True)
    return {name: values[name] for name in jobs}

  def _kept(self) -> dict[str, Any]:
    """What the file holds; a line that a killed run left unfinished is no part."""
    values = {}
    for line in self._file.read_text(encoding="utf-8").splitlines() if self._file and self._file.is_file() else ():
      try:
        part = json.loads(line)
        values[part["part"]] = part["value"]
      except (ValueError, KeyError, TypeError):
        continue
    return values
