"""What a run writes down: a progress bar, JSONL and TensorBoard events."""

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import rich.console
import rich.progress
import rich.table
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from nfnets import distributed
from nfnets.files import write_file
from nfnets.train.logs.curves import draw_curves

LINES, EVENTS = "metrics.jsonl", "tensorboard"


FLUSH_SECONDS = 30  # until TensorBoard sees what is new


REDRAW_SECONDS = 600  # a long run's picture is drawn again at an evaluation after this time


class Terminal(rich.console.Console):
  """Falls silent when nobody reads any more (Ctrl-C ends `… | tee log` too), instead of ending the run before it has saved."""

  def on_broken_pipe(self) -> None:
    self.quiet = True
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's own last flush changes the exit status


class Logbook:
  """Writes `workdir/metrics.jsonl`, `workdir/tensorboard/` and `workdir/curves.png`, and shows progress on `console`.

  On a terminal a bar, elsewhere plain lines. Starting at a step drops what was written about later ones, so that a resumed
  run's record reads as an uninterrupted one's.
  """

  def __init__(
    self,
    workdir: str,
    *,
    start_step: int,
    total_steps: int,
    train_label: str = "train",
    console: rich.console.Console | None = None,
  ):
    self.console = console or Terminal(highlight=False, soft_wrap=True)
    self._dir = pathlib.Path(workdir)
    self._total, self._train_label, self._hinted = total_steps, train_label, False
    self._records = read_jsonl(self._dir / LINES)
    self._files: dict[str, Any] = {}  # what is open; an error closes it
    self._drawn, self._drawn_records = time.monotonic(), 0
    self.rewind(start_step)
    whole = rich.table.Column(no_wrap=True)
    self._bar = rich.progress.Progress(
      rich.progress.MofNCompleteColumn(table_column=whole),
      rich.progress.BarColumn(bar_width=None, table_column=rich.table.Column(ratio=1, min_width=4)),
      rich.progress.TextColumn("{task.fields[text]}", table_column=whole),
      rich.progress.TimeRemainingColumn(table_column=whole),
      console=self.console,
      disable=not self.console.is_terminal,
      transient=True,
      expand=True,
    )
    self._task = self._bar.add_task("training", total=total_steps, completed=start_step, text="compiling …")
    self._bar.start()

  def rewind(self, step: int) -> None:
    """Drops what was written about later steps."""
    self._records = [record for record in self._records if record["step"] <= step]
    self._drop(LINES)
    self._drop(EVENTS)
    with self._whatever_the_disk_does(LINES):
      self._open_lines()
    with self._whatever_the_disk_does(EVENTS):
      self._open_events(step + 1)

  def _open_lines(self) -> None:
    """Writes all records anew: metrics.jsonl is the old or the whole new one, whenever the power fails."""
    path = self._dir / LINES
    write_file(path, "".join(json.dumps(record) + "\n" for record in self._records).encode())
    self._files[LINES] = open(path, "a", encoding="utf-8")

  def _open_events(self, step: int) -> None:
    """Not by SummaryWriter: its thread ends at the first error of the disk, after which its queue blocks who adds to it."""
    (self._dir / EVENTS).mkdir(exist_ok=True)
    self._files[EVENTS], self._flushed = EventsWriter(str(self._dir / EVENTS / "events"), f".{step}"), time.monotonic()
    hides_what_came_later = SessionLog(status=SessionLog.START)
    self._files[EVENTS].write_event(Event(step=step, session_log=hides_what_came_later))

  def advance(self, step: int) -> None:
    self._bar.update(self._task, completed=step)

  def train(self, step: int, scalars: dict[str, float], clip_by_layer: dict[str, float], seconds_per_step: float | None) -> None:
    """scalars: means since the last call: "loss", "top1" (fraction), "lr", "images_per_second", with AGC "clip_fraction", …"""
    self._write({"kind": "train", "step": step, **scalars, **({"clip": clip_by_layer} if clip_by_layer else {})})
    text = (
      f"loss {scalars['loss']:.3f}  top-1 {scalars['top1']:.1%}"
      + (f"  {scalars['images_per_second']:,.0f} images/s" if "images_per_second" in scalars else "")
      + (f"  clip {scalars['clip_fraction']:.1%}" if "clip_fraction" in scalars else "")
      + (f"  data_wait {scalars['data_wait']:.0%}" if "data_wait" in scalars else "")
    )
    if scalars.get("data_wait", 0) > 0.05 and not self._hinted:
      self._hinted = True
      self.say(
        f"the devices waited for data {scalars['data_wait']:.0%} of the time: give this host more cores or "
        "config.data.threads, or smaller images (python -m launch.data prepare); what takes the time: "
        "python -m launch.bench data"
      )
    self._bar.update(self._task, completed=step, text=text)
    if not self.console.is_terminal:
      left = (self._total - step) * (seconds_per_step or 0)
      self.console.print(
        f"step {step:>{len(str(self._total))}}/{self._total}  epoch {scalars['epoch']:.1f}  {text}  "
        f"lr {scalars['lr']:.4g}" + (f"  {left // 60:.0f}:{left % 60:02.0f} left" if seconds_per_step else "")
      )

  def test(self, step: int, epoch: float, results: dict[str, dict[str, float]]) -> None:
    """results: {"params": {"loss", "top1", "top5", "count"}, "ema": …}."""
    flat = {
      key if name == "params" else f"{name}_{key}": value for name, found in results.items() for key, value in found.items()
    }
    if not any(record["kind"] == "test" and record["step"] == step for record in self._records):
      self._write({"kind": "test", "step": step, "epoch": epoch, **flat})
    parts = "  ".join(f"{name}: top-1 {found['top1']:.2%} loss {found['loss']:.4f}" for name, found in results.items())
    self.console.print(f"test at epoch {epoch:.1f}, {results['params']['count']:,} images  {parts}")
    if time.monotonic() - self._drawn > REDRAW_SECONDS:
      self.draw()

  def say(self, text: str) -> None:
    self.console.print(text, markup=False)

  warn = say

  def draw(self) -> pathlib.Path | None:
    self._drawn, self._drawn_records = time.monotonic(), len(self._records)
    path = self._dir / "curves.png"
    if not any(record["kind"] == "train" for record in self._records):
      return None
    with self._whatever_the_disk_does("curves.png"):
      draw_curves(self._records, path, self._train_label)
    return path

  def sync(self) -> None:
    """Brings the records to the disk (or into the mounted bucket): as safe as the checkpoint that follows."""
    with self._whatever_the_disk_does(LINES):
      if LINES not in self._files:
        self._open_lines()
      os.fsync(self._files[LINES].fileno())
    with self._whatever_the_disk_does(EVENTS):
      if EVENTS in self._files:
        self._files[EVENTS].flush()

  def close(self) -> None:
    """Ends the bar; after an error the picture still shows how far it went."""
    self._bar.stop()
    if self._drawn_records < len(self._records):
      self.draw()
    self.sync()
    self._drop(LINES)
    self._drop(EVENTS)

  def _write(self, record: dict[str, Any]) -> None:
    self._records.append(record)
    with self._whatever_the_disk_does(LINES):
      if LINES not in self._files:
        self._open_lines()
      else:
        self._files[LINES].write(json.dumps(record) + "\n")
        self._files[LINES].flush()
    scalars = {f"{record['kind']}/{key}": value for key, value in record.items() if key not in ("kind", "step", "clip")}
    scalars |= {f"clip/{layer}": value for layer, value in record.get("clip", {}).items()}
    values = [value for name, number in scalars.items() for value in summary.scalar(name, number).value]
    with self._whatever_the_disk_does(EVENTS):
      if EVENTS not in self._files:
        self._open_events(record["step"])
      self._files[EVENTS].write_event(Event(step=record["step"], wall_time=time.time(), summary=summary.Summary(value=values)))
      if time.monotonic() - self._flushed > FLUSH_SECONDS:
        self._files[EVENTS].flush()
        self._flushed = time.monotonic()

  @contextlib.contextmanager
  def _whatever_the_disk_does(self, name: str) -> Iterator[None]:
    """Training goes on without a record; the next one tries a new file."""
    try:
      yield
    except OSError as error:
      self._drop(name)
      self.say(f"{self._dir / name} cannot be written: {error.strerror}; training goes on")

  def _drop(self, name: str) -> None:
    file = self._files.pop(name, None)
    if file is not None:
      with contextlib.suppress(OSError):
        file.close()


class Silence:
  """The logbook of every process but the first: nothing is written, and only what is wrong here is said."""

  console = rich.console.Console(quiet=True)

  def train(self, step: int, scalars: dict[str, float], clip_by_layer: dict[str, float], seconds_per_step: float) -> None:
    pass

  def test(self, step: int, epoch: float, results: dict[str, dict[str, float]]) -> None:
    pass

  def advance(self, step: int) -> None:
    pass

  rewind = advance

  def say(self, text: str) -> None:
    pass

  def warn(self, text: str) -> None:
    print(f"{distributed.label()}{text}", flush=True)

  def draw(self) -> None:
    pass

  sync = draw


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a file, oldest first; [] where there is none. A last line cut off by a crash is left out."""
  if not path.exists():
    return []
  records = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return records
