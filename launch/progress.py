"""Shows how far a program is, with the rate and the time left: as a bar on a terminal, as lines elsewhere."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator

import rich.console
import rich.progress

LINE_EVERY_S = 10.0  # seconds between two lines where there is no terminal


def plain_console() -> rich.console.Console:
  """Makes a console that prints lines as they are: it does not wrap them, and reads no markup and no colours into them."""
  return rich.console.Console(highlight=False, soft_wrap=True, markup=False)


def table_console() -> rich.console.Console:
  """Makes a console for tables: as wide as the terminal, and 130 columns where there is none."""
  console = rich.console.Console(highlight=False)
  return console if console.is_terminal else rich.console.Console(highlight=False, width=130)


@dataclasses.dataclass(slots=True)
class Meter:
  """Keeps and shows how much of something is done.

  Attributes:
    console: where it is shown.
    title: words for what is being done.
    total: how much there is to do.
    unit: what is counted, in the plural, e.g. "images".
    already: how much was done before the meter began.
    done: how much is done now, including `already`.
  """

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
    """Sets how much is done in all, and shows it."""
    self.done = done
    if self._bar is not None:
      self._bar.update(self._bar.task_ids[0], completed=done, rate=f"{self.rate:,.0f} {self.unit}/s")
    elif done == self.total or time.monotonic() - self._last_line >= LINE_EVERY_S:
      self._last_line = time.monotonic()
      left = f", {(self.total - done) / max(self.rate, 1e-9):,.0f} s left" if done < self.total else ""
      self.console.print(f"{self.title}: {done:,} of {self.total:,} {self.unit}, {self.rate:,.0f} {self.unit}/s{left}")

  def advance(self, count: int) -> None:
    """Adds to what is done, and shows it; several threads may call this at once."""
    with self._lock:
      self.set(self.done + count)


@contextlib.contextmanager
def meter(console: rich.console.Console, title: str, total: int, unit: str, already: int = 0) -> Iterator[Meter]:
  """Gives a Meter for a `with` block; its arguments are the Meter's. On a terminal the bar is removed at the end."""
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
