"""Lets processes that time the same work take turns; this file needs Python's standard library alone.

Each side of a comparison is a Python file with a function `start(job)`, which builds everything and returns an object with

    facts            a dict for JSON: what was built, on what, with which versions
    seconds(steps)   runs so many steps in a row, waits for the last one, and returns the seconds of a step
    loss()           the loss of the last step; FloatingPointError where it is not finite

`Side` runs such a file in a process of its own, `python -P turns.py FILE`, and talks to it in lines of JSON: the job, answered by
the facts, then for each turn how many steps to time. Between its turns a process waits for the next line and computes nothing.
"""

import contextlib
import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any

BLOCKS = 5  # a turn's steps are timed in about so many blocks, for a median and its spread
STDERR_TAIL = 4000  # characters of a process's last words that a failure shows


class MissingPackage(Exception):
  """The side `args[0]` could not import the package `args[1]`."""


class SideError(Exception):
  """A side ended with a mistake that a person can mend; the argument says which side, and in words what."""


class Side:
  """A process that times steps when it is asked to; to be used in a `with` statement, at whose end the process is gone."""

  def __init__(self, name: str, file: str, job: Mapping[str, Any], *, environment: Mapping[str, str] | None = None):
    """Starts the process and waits until it is ready.

    Args:
      name: of the side, for messages.
      file: the Python file with `start`.
      job: its argument, ready for JSON.
      environment: variables beside this process's own.

    Raises:
      MissingPackage, SideError: the process says so.
      RuntimeError: it failed otherwise; the message ends with what it wrote last.
    """
    begin = time.perf_counter()
    self.name = name
    self._stderr: IO[bytes] = tempfile.TemporaryFile()
    self._process = subprocess.Popen(
      [sys.executable, "-P", os.path.abspath(__file__), file],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._stderr,
      text=True,
      env={**os.environ, **(environment or {})},
    )
    try:
      self.facts: dict[str, Any] = self._ask(job)
    except BaseException:
      self.close()
      raise
    self.start_s = time.perf_counter() - begin  # from the start of the process until it is ready to time steps

  def __enter__(self) -> "Side":
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
    self.close()

  def seconds(self, steps: int, *, untimed: int = 0) -> list[float]:
    """Runs `untimed` steps and then `steps`, about `BLOCKS` blocks of them in a row; returns seconds a step of each block."""
    block = max(1, steps // BLOCKS)
    return self._ask({"untimed": untimed, "blocks": [block] * (steps // block)})["seconds"]

  def loss(self) -> float:
    """Returns the loss of the last step; raises SideError where it is not finite."""
    return self._ask({"loss": True})["loss"]

  def close(self) -> None:
    """Ends the process."""
    assert self._process.stdin is not None and self._process.stdout is not None
    with contextlib.suppress(OSError):
      self._process.stdin.close()  # the process ends by itself when its input does
    try:
      self._process.wait(timeout=10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()
    self._stderr.close()

  def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
    assert self._process.stdin is not None and self._process.stdout is not None
    try:
      self._process.stdin.write(json.dumps(question) + "\n")
      self._process.stdin.flush()
      answer = self._process.stdout.readline()
    except OSError:  # it has died, and its last words say why
      answer = ""
    if not answer:
      status = self._process.wait()
      self._stderr.seek(0)
      last = self._stderr.read().decode(errors="replace")[-STDERR_TAIL:]
      raise RuntimeError(f"the process of {self.name} ended with status {status}:\n{last}")
    read = json.loads(answer)
    if "missing" in read:
      raise MissingPackage(self.name, read["missing"])
    if "error" in read:
      raise SideError(f"{self.name}: {read['error']}")
    return read


# ---- in the side's own process


def main(file: str) -> None:
  """Builds what `file` says, and times steps until the input ends. What else is printed goes to stderr: stdout is the pipe."""
  answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)
  gc.set_threshold(50_000, 20, 100)  # as launch/cli.py does, for every side
  try:
    side = _load(file).start(json.loads(sys.stdin.readline()))
    _answer(answers, side.facts)
    for line in sys.stdin:
      _answer(answers, _turn(side, json.loads(line)))
  except ImportError as error:
    _answer(answers, {"missing": error.name} if error.name else {"error": str(error)})
  except Exception as error:
    mistake = _mistake(error)
    if mistake is None:
      raise
    _answer(answers, {"error": mistake})


def _turn(side: Any, question: dict[str, Any]) -> dict[str, Any]:
  if "loss" in question:
    loss = float(side.loss())
    if not math.isfinite(loss):
      raise FloatingPointError(f"its loss is {loss}: the time of such steps means nothing; lower config.optim.base_lr")
    return {"loss": loss}
  if question["untimed"]:
    side.seconds(question["untimed"])
  return {"seconds": [side.seconds(steps) for steps in question["blocks"]]}


def _mistake(error: Exception) -> str | None:
  """Returns the words for what a person can mend: too little memory, a loss that is not finite, a wrong setting; else None."""
  text = str(error)
  if "out of memory" in text.lower() or "RESOURCE_EXHAUSTED" in text:
    first = text.splitlines()[0]
    return f"out of memory; lower --batch or --image_size ({first[:200]})"
  kinds = {kind.__name__ for kind in type(error).__mro__}  # by name: this file cannot import nfnets.errors
  if kinds & {"UserError", "FloatingPointError"}:
    return text
  return None


def _answer(answers: IO[str], facts: Mapping[str, Any]) -> None:
  answers.write(json.dumps(facts) + "\n")
  answers.flush()


def _load(file: str) -> Any:
  name = os.path.basename(file).removesuffix(".py")
  spec = importlib.util.spec_from_file_location(name, file)
  if spec is None or spec.loader is None:
    raise RuntimeError(f"{file} is no Python file")
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  spec.loader.exec_module(module)
  return module


if __name__ == "__main__":
  main(sys.argv[1])
