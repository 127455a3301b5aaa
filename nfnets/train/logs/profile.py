"""Traces some steps with JAX's profiler, and says which operations took most of their time.

The trace is what `jax.profiler` writes (XProf and TensorBoard show it); it is read back with JAX alone.
"""

import collections
import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

SKIPPED = 10  # steps before the trace: the first compile and fill caches
TRACED = 10  # steps in the trace
SHOWN = 10  # operations in the table
WIDTH = 60  # characters of an operation's name there
NOT_OPERATIONS = ("Steps", "XLA Modules", "XLA TraceMe", "Async XLA Ops")  # lines of a device that span its operations


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
  """What one operation of a compiled program took in all: its own time, without that of operations inside it."""

  name: str
  milliseconds: float


@contextlib.contextmanager
def trace(directory: str) -> Iterator[None]:
  """Traces what runs inside, without Python's own calls, which would fill the trace."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with jax.profiler.trace(directory, profiler_options=options):
    yield


class StepTracer:
  """Traces steps of a training loop, from the process's eleventh to its twentieth; without a directory it does nothing."""

  def __init__(self, directory: str | None, say: Callable[[str], None]):
    self.directory, self.say = directory, say
    self.steps = 0  # that have begun
    self.traced = 0
    self.opened = contextlib.ExitStack()

  def __enter__(self) -> "StepTracer":
    return self

  def __exit__(self, *error: object) -> None:
    if self.directory is None:
      return
    if self.traced:
      self._end()
    elif self.steps <= SKIPPED:
      self.say(f"nothing was traced: the run ended before its step {SKIPPED + 1} since the start of this process")

  def before_step(self, state: Any) -> None:
    """Begins or ends the trace where it is time, once `state`, the result of the steps before, is there."""
    if self.directory is None:
      return
    if self.steps == SKIPPED:
      jax.block_until_ready(state)
      self.opened.enter_context(trace(self.directory))
    if self.steps == SKIPPED + TRACED:
      jax.block_until_ready(state)
      self._end()
    self.traced += SKIPPED <= self.steps < SKIPPED + TRACED
    self.steps += 1

  def _end(self) -> None:
    """Ends the trace and prints its table."""
    steps, self.traced = self.traced, 0
    self.opened.close()
    assert self.directory is not None
    self.say(table(newest(self.directory), steps))


def newest(directory: str) -> pathlib.Path:
  """Returns the newest trace below a directory. Raises FileNotFoundError where there is none."""
  files = sorted(pathlib.Path(directory).rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
  if not files:
    raise FileNotFoundError(f"JAX's profiler has left no trace in {directory}")
  return files[-1]


def operations(file: pathlib.Path) -> list[Operation]:
  """Reads a trace: the operations of compiled programs on all devices and threads, the most expensive first."""
  total: dict[tuple[str, str], float] = collections.defaultdict(float)
  for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
    for line in plane.lines:
      if line.name not in NOT_OPERATIONS:
        for key, nanoseconds in own_times(_spans(line.events)):
          total[key] += nanoseconds
  several = len({module for module, _ in total}) > 1
  return [
    Operation(name=f"{module}: {name}" if several else name, milliseconds=nanoseconds / 1e6)
    for (module, name), nanoseconds in sorted(total.items(), key=lambda item: -item[1])
  ]


def own_times(spans: Iterable[tuple[tuple[str, str], float, float]]) -> Iterator[tuple[tuple[str, str], float]]:
  """Gives each span of one thread, (key, start, end), the time that no span inside it takes."""
  open_spans: list[list[Any]] = []  # [key, end, time of its own], each inside the one before
  for key, start, end in sorted(spans, key=lambda span: (span[1], -span[2])):
    while open_spans and open_spans[-1][1] <= start:
      yield open_spans[-1][0], open_spans.pop()[2]
    if open_spans:
      open_spans[-1][2] -= min(end, open_spans[-1][1]) - start
    open_spans.append([key, end, end - start])
  yield from ((key, own) for key, _, own in open_spans)


def table(file: pathlib.Path, steps: int) -> str:
  """Returns the most expensive operations of a trace of `steps` steps, with their share of the time of all, as lines."""
  found = operations(file)
  whole = sum(operation.milliseconds for operation in found)
  lines = [f"trace of {steps} step{'s' * (steps != 1)}: {file}"]
  if not found:
    return f"{lines[0]}\nit has no operation of a compiled program that could be read"
  names = [name if len(name) <= WIDTH else f"{name[: WIDTH - 1]}…" for name in (operation.name for operation in found[:SHOWN])]
  width = max(map(len, names))
  lines.append(f"{'operation'.ljust(width)}  ms a step  share")
  for name, operation in zip(names, found, strict=False):
    share = f"{100 * operation.milliseconds / whole:.1f} %"
    lines.append(f"{name.ljust(width)}  {operation.milliseconds / max(1, steps):9.3f}  {share:>6}")
  lines.append(f"of {len(found)} operations, {whole / max(1, steps):.3f} ms a step, summed over devices and threads")
  return "\n".join(lines)


def _spans(events: Iterable[Any]) -> Iterator[tuple[tuple[str, str], float, float]]:
  """Yields ((program, operation), start, end) of those events that are operations, in nanoseconds."""
  for event in events:
    stats = dict(event.stats)
    if "hlo_op" in stats:
      name = str(stats["hlo_op"])
      name = event.name if name.startswith("command_buffer") else name  # of a GPU: what the graph of kernels runs
      yield (str(stats.get("hlo_module", "")), name), event.start_ns, event.start_ns + event.duration_ns
