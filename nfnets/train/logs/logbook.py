"""What a run writes down: a progress bar, JSONL and TensorBoard events, its picture."""

import contextlib
import json
import math
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
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute]: generated

from nfnets import distributed
from nfnets.files import write_file
from nfnets.train.logs.curves import draw_curves

LINES, EVENTS, CURVES = "metrics.jsonl", "tensorboard", "curves.png"
FLUSH_SECONDS = 30  # until TensorBoard sees what is new
REDRAW_SECONDS = 600  # a long run's picture is drawn again at an evaluation after this time
WAITING_HINT = 0.05  # share of waiting for data from which on the log says what helps


class Terminal(rich.console.Console):
  """Falls silent when nobody reads any more (Ctrl-C ends `… | tee log` too), instead of ending the run before it has saved."""

  def on_broken_pipe(self) -> None:
    self.quiet = True
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's own last flush changes the exit status


class Logbook:
  """Writes `workdir/metrics.jsonl`, `workdir/tensorboard/` and `workdir/curves.png`, and shows progress: a bar or plain lines.

  With `write=False`, as in every process but the first, nothing is written or shown but warnings. No error of the disk ends the
  training: the record that could not be written is said, and the next one tries a new file.
  """

  def __init__(self, workdir: str, *, write: bool = True, console: rich.console.Console | None = None):
    self.console = console or (Terminal(highlight=False, soft_wrap=True) if write else rich.console.Console(quiet=True))
    self._dir, self._write = pathlib.Path(workdir), write
    self._records: list[dict[str, Any]] = []
    self._open_files: dict[str, Any] = {}  # by name; an error closes a file and takes it out
    self._flushed = self._drawn = time.monotonic()
    self._drawn_records, self._hinted, self._begun = 0, False, False
    self._total_steps, self._train_label = 0, "train"
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
    self._task = self._bar.add_task("training", total=None, text="compiling …")

  def begin(self, step: int, total_steps: int, train_label: str = "train") -> None:
    """The run begins at `step` of `total_steps`. What was written about later steps is dropped, as by `rewind`."""
    self._total_steps, self._train_label, self._begun = total_steps, train_label, True
    if self._write:
      self._records = read_jsonl(self._dir / LINES)
    self.rewind(step)
    self._bar.update(self._task, total=total_steps, completed=step)
    self._bar.start()

  def rewind(self, step: int) -> None:
    """Drops what was written about later steps, so that a resumed run's record reads as that of an uninterrupted one."""
    if not self._write:
      return
    self._records = [record for record in self._records if record["step"] <= step]
    self._close_file(LINES)
    self._close_file(EVENTS)
    with self._going_on_after_disk_errors(LINES):
      self._open_lines()
    with self._going_on_after_disk_errors(EVENTS):
      self._open_events(step + 1)

  def advance(self, step: int) -> None:
    self._bar.update(self._task, completed=step)

  def train(self, step: int, scalars: dict[str, float], clip_by_layer: dict[str, float], seconds_per_step: float | None) -> None:
    """Writes down the steps since the last call.

    Args:
      step: the last of them.
      scalars: their means, "loss", "top1" (fraction), "lr", "images_per_second", with AGC "clip_fraction" …
      clip_by_layer: share of each layer's units that were clipped at the last step; empty without AGC.
      seconds_per_step: None where it is not known.
    """
    self._record({"kind": "train", "step": step, **scalars, **({"clip": clip_by_layer} if clip_by_layer else {})})
    text = f"loss {scalars['loss']:.3f}  top-1 {scalars['top1']:.1%}"
    for name, form in (
      ("images_per_second", "{:,.0f} images/s"),
      ("clip_fraction", "clip {:.1%}"),
      ("data_wait", "data_wait {:.0%}"),
    ):
      text += f"  {form.format(scalars[name])}" if name in scalars else ""
    if scalars.get("data_wait", 0) > WAITING_HINT and not self._hinted:
      self._hinted = True
      self.say(
        f"the devices waited for data {scalars['data_wait']:.0%} of the time: give this host more cores or "
        "config.data.threads, or smaller images (python -m launch.data prepare); what takes the time: "
        "python -m launch.bench data"
      )
    self._bar.update(self._task, completed=step, text=text)
    if not self.console.is_terminal:
      left = (self._total_steps - step) * (seconds_per_step or 0)
      self.console.print(
        f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}  epoch {scalars['epoch']:.1f}  {text}  "
        f"lr {scalars['lr']:.4g}" + (f"  {left // 60:.0f}:{left % 60:02.0f} left" if seconds_per_step else "")
      )

  def test(self, step: int, epoch: float, results: dict[str, dict[str, float]]) -> None:
    """Writes down an evaluation. results: {"params": {"loss", "top1", "top5", "count"}, "ema": …}."""
    if not any(record["kind"] == "test" and record["step"] == step for record in self._records):
      flat = {
        name if weights == "params" else f"{weights}_{name}": value
        for weights, values in results.items()
        for name, value in values.items()
      }
      self._record({"kind": "test", "step": step, "epoch": epoch, **flat})
    parts = "  ".join(f"{name}: top-1 {values['top1']:.2%} loss {values['loss']:.4f}" for name, values in results.items())
    self.console.print(f"test at epoch {epoch:.1f}, {results['params']['count']:,} images  {parts}")
    if time.monotonic() - self._drawn > REDRAW_SECONDS:
      self.draw()

  def say(self, text: str) -> None:
    """A line for people; the first process says it for all."""
    self.console.print(text, markup=False)

  def warn(self, text: str) -> None:
    """A line about this very process: every process says its own."""
    if self._write:
      self.say(text)
    else:
      print(f"{distributed.label()}{text}", flush=True)

  def draw(self) -> pathlib.Path | None:
    """Draws the picture of all records; its path, or None where there is nothing to draw or it cannot be written."""
    self._drawn, self._drawn_records = time.monotonic(), len(self._records)
    if not any(record["kind"] == "train" for record in self._records):
      return None
    path = self._dir / CURVES
    with self._going_on_after_disk_errors(CURVES):
      write_file(path, draw_curves(self._records, self._train_label))
      return path
    return None

  def sync(self) -> None:
    """Brings the records to the disk (or into the mounted bucket): as safe as the checkpoint that follows."""
    if not self._write:
      return
    with self._going_on_after_disk_errors(LINES):
      if LINES not in self._open_files:
        self._open_lines()
      os.fsync(self._open_files[LINES].fileno())
    with self._going_on_after_disk_errors(EVENTS):
      if EVENTS in self._open_files:
        self._open_files[EVENTS].flush()

  def close(self) -> None:
    """Ends the bar; after an error the picture still shows how far the run went. Writes nothing if the run has not begun."""
    self._bar.stop()
    if not self._begun:
      return
    if self._drawn_records < len(self._records):
      self.draw()
    self.sync()
    self._close_file(LINES)
    self._close_file(EVENTS)

  def _record(self, record: dict[str, Any]) -> None:
    if not self._write:
      return
    self._records.append(record)
    with self._going_on_after_disk_errors(LINES):
      if LINES not in self._open_files:
        self._open_lines()  # writes this record too
      else:
        self._open_files[LINES].write(_line(record))
        self._open_files[LINES].flush()
    with self._going_on_after_disk_errors(EVENTS):
      if EVENTS not in self._open_files:
        self._open_events(record["step"])
      self._open_files[EVENTS].write_event(_event(record))
      if time.monotonic() - self._flushed > FLUSH_SECONDS:
        self._open_files[EVENTS].flush()
        self._flushed = time.monotonic()

  def _open_lines(self) -> None:
    """Writes all records anew: whenever the power fails, metrics.jsonl is the old or the whole new one."""
    path = self._dir / LINES
    write_file(path, "".join(_line(record) for record in self._records).encode())
    self._open_files[LINES] = open(path, "a", encoding="utf-8")

  def _open_events(self, step: int) -> None:
    """Not by SummaryWriter: its thread ends at the first error of the disk, and then its queue blocks the training."""
    (self._dir / EVENTS).mkdir(exist_ok=True)
    events, self._flushed = EventsWriter(str(self._dir / EVENTS / "events"), f".{step}"), time.monotonic()
    self._open_files[EVENTS] = events
    events.write_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))  # hides what was written of later steps

  @contextlib.contextmanager
  def _going_on_after_disk_errors(self, name: str) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      self._close_file(name)
      self.say(f"{self._dir / name} cannot be written: {error.strerror}; training goes on")

  def _close_file(self, name: str) -> None:
    file = self._open_files.pop(name, None)
    if file is not None:
      with contextlib.suppress(OSError):
        file.close()


def _line(record: dict[str, Any]) -> str:
  """A record as metrics.jsonl has it. JSON knows neither NaN nor infinity: null stands for them."""
  finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
  return json.dumps(finite, allow_nan=False) + "\n"


def _event(record: dict[str, Any]) -> Event:
  """A record as TensorBoard has it."""
  scalars = {
    f"{record['kind']}/{key}": value for key, value in record.items() if key not in ("kind", "step", "clip") and value is not None
  }
  scalars |= {f"clip/{layer}": value for layer, value in record.get("clip", {}).items()}
  values = [value for name, number in scalars.items() for value in summary.scalar(name, number).value]
  return Event(step=record["step"], wall_time=time.time(), summary=summary.Summary(value=values))


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
