"""One progress meter for the programs: a bar on a terminal, lines elsewhere, with rate and time left."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator

import rich.console
import rich.progress

LINE_EVERY_S = 10.0  # seconds between two lines where there is no terminal


def plain_console() -> rich.console.Console:
  """A console that prints lines as they are: not wrapped, no markup, no colours for numbers."""
  return rich.console.Console(highlight=False, soft_wrap=True, markup=False)


@dataclasses.dataclass(slots=True)
class Meter:
  """How much of `total` is done. unit: what is counted, in the plural, e.g. "images"; `already` was done before it began."""

  console: rich.console.Console
  title: str
  total: int
  unit: str
  already: int = 0
  done: int = 0
  _began: float = dataclasses.field(default_factory=time.monotonic)
  _last_line: float = dataclasses.field(default_factory=time.monotonic)
  _bar: rich.progress.Progress | None = None
  _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

  @property
  def rate(self) -> float:
    """Units a second since the meter began."""
    return (self.done - self.already) / max(time.monotonic() - self._began, 1e-9)

  def set(self, done: int) -> None:
    """Says how much is done in all."""
    self.done = done
    if self._bar is not None:
      self._bar.update(self._bar.task_ids[0], completed=done, rate=f"{self.rate:,.0f} {self.unit}/s")
    elif done == self.total or time.monotonic() - self._last_line >= LINE_EVERY_S:
      self._last_line = time.monotonic()
      left = f", {(self.total - done) / max(self.rate, 1e-9):,.0f} s left" if done < self.total else ""
      self.console.print(f"{self.title}: {done:,} of {self.total:,} {self.unit}, {self.rate:,.0f} {self.unit}/s{left}")

  def advance(self, count: int) -> None:
    """Says that so many more are done; several threads may."""
    with self._lock:
      self.set(self.done + count)


@contextlib.contextmanager
def meter(console: rich.console.Console, title: str, total: int, unit: str, already: int = 0) -> Iterator[Meter]:
  """A Meter whose bar, on a terminal, goes away at the end."""
  columns = (
    rich.progress.TextColumn("{task.description}", markup=False),
    rich.progress.BarColumn(20),
    rich.progress.TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
    rich.progress.TextColumn("{task.fields[rate]}", markup=False),
    rich.progress.TimeRemainingColumn(),
  )
  measured = Meter(console, title, total, unit, already, already)
  if not console.is_terminal:
    yield measured
    return
  with rich.progress.Progress(*columns, console=console, transient=True) as bar:
    bar.add_task(title, total=total, completed=already, rate="")
    measured._bar = bar
    yield measured
