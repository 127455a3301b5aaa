"""One run at a time in a workdir: a lock that its holder keeps alive, and that a crash does not leave behind for ever.

The lock is a file, `workdir/run.lock`. It appears whole, by a hard link to a finished file, or where there are none (a mounted
bucket) by O_EXCL; only one of several runs can make it. It names machine, process and start time, and its holder writes it anew
every BEAT_S seconds, so that it also works on network file systems and mounted buckets, where `flock` may not.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from nfnets import distributed
from nfnets.errors import UserError
from nfnets.files import write_file

NAME = "run.lock"
BEAT_S = 10.0  # seconds between two signs of life
SILENCE_S = 60.0  # after so many seconds without one, the holder on another machine counts as gone


class WorkdirInUse(UserError):
  """Another run that is still alive has the workdir."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
  """Who holds a lock.

  host: for people.
  machine: a kernel since its start, and one numbering of its processes (a container has its own); "" where a lock cannot be read.
  pid, born: the process, and what tells it from a later one of the same number.
  since: when it took the lock, for people.
  beat: counts its signs of life; of a lock that cannot be read, the time when it was written, ns.
  """

  host: str = "an unknown host"
  machine: str = ""
  pid: int = 0
  born: str = ""
  since: str = "an unknown time"
  beat: int = 0

  def __str__(self) -> str:
    return f"process {self.pid} on {self.host}, since {self.since}" if self.machine else "an unknown process"

  def same_process(self, other: "Holder") -> bool:
    return (self.machine, self.pid, self.born) == (other.machine, other.pid, other.born)


@contextlib.contextmanager
def workdir_lock(
  workdir: str, *, say: Callable[[str], None], end: Callable[[str], None] = lambda line: _end_process(line)
) -> Iterator[None]:
  """Holds the workdir's lock; one process of a run takes it, before anything is written there.

  A lock is broken, with a line, when its process is gone: at once on this machine; on another one (or in another container), or
  where the lock cannot be read, after SILENCE_S seconds without a sign of life. A holder that finds another's lock in the place
  of its own (it was stalled for so long that it counted as gone) never writes over it: `end` gets a line, and by default ends
  the process with status LOST.

  Raises:
    WorkdirInUse: a run that is alive holds it. UserError: the workdir cannot be written.
  """
  path = pathlib.Path(workdir) / NAME
  me = Holder(
    host=platform.node(),
    machine=_machine(),
    pid=os.getpid(),
    born=_start_of_process(os.getpid()) or "",
    since=time.strftime("%Y-%m-%d %H:%M:%S"),
  )
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _take(path, me, say)
  except OSError as error:
    raise UserError(f"--workdir={workdir}: cannot be written: {error.strerror}; expected a directory to write to") from error
  released = threading.Event()
  thread = threading.Thread(target=_beat, args=(path, me, released, end), name="workdir lock", daemon=True)
  thread.start()
  try:
    yield
  finally:
    released.set()
    thread.join()
    holder = _read(path)
    if holder is not None and holder.same_process(me):
      path.unlink(missing_ok=True)


def _take(path: pathlib.Path, me: Holder, say: Callable[[str], None]) -> None:
  while not _create(path, me):
    holder = _read(path)
    if holder is None:
      continue  # it has just been released
    if holder.machine == me.machine:
      if _start_of_process(holder.pid) == holder.born and not holder.same_process(me):
        raise _in_use(path, holder)
      say(f"{path} was left by {holder}, which is gone: broken")
    elif _stays_silent(path, holder, say):
      say(f"{path} was left by {holder}, which gave no sign of life for {SILENCE_S:g} s: broken")
    else:
      continue
    _break(path, holder)


def _break(path: pathlib.Path, holder: Holder) -> None:
  """Removes the lock of `holder`, and no other's that may have taken its place in the meantime."""
  aside = path.with_name(f".{NAME}.{uuid.uuid4().hex[:12]}.tmp")
  with contextlib.suppress(FileNotFoundError):
    os.rename(path, aside)
    if _read(aside) != holder and not path.exists():
      os.rename(aside, path)
    aside.unlink(missing_ok=True)


def _in_use(path: pathlib.Path, holder: Holder) -> WorkdirInUse:
  return WorkdirInUse(
    f"--workdir={path.parent}: another run has it ({holder}); expected a workdir that no run is using: wait for its end, or "
    "give another"
  )


def _stays_silent(path: pathlib.Path, holder: Holder, say: Callable[[str], None]) -> bool:
  """Whether the holder gives no sign of life for SILENCE_S; False where it releases the lock in the meantime.

  The clocks of two machines differ, so its beats are watched, not its times. Raises WorkdirInUse at a sign of life.
  """
  say(f"{path} is held by {holder}: waiting up to {SILENCE_S:g} s for a sign of life")
  deadline = time.monotonic() + SILENCE_S
  while time.monotonic() < deadline:
    time.sleep(min(1.0, SILENCE_S / 10))
    now = _read(path)
    if now is None:
      return False
    if now != holder:
      raise _in_use(path, now)
  return True


def _create(path: pathlib.Path, me: Holder) -> bool:
  """Makes the lock file unless there is one."""
  content = json.dumps(dataclasses.asdict(me)).encode()
  finished = path.with_name(f".{NAME}.{uuid.uuid4().hex[:12]}.tmp")
  try:
    write_file(finished, content)
    try:
      os.link(finished, path)
    except FileExistsError:
      return False
    except OSError:  # no hard links here
      with open(path, "xb") as file:
        file.write(content)
  except FileExistsError:
    return False
  finally:
    finished.unlink(missing_ok=True)
  return True


def _beat(path: pathlib.Path, me: Holder, released: threading.Event, end: Callable[[str], None]) -> None:
  count = 0
  while not released.wait(BEAT_S):
    holder = _read(path)
    if holder is not None and not holder.machine:
      continue  # a moment's fault of the file system: the next beat may get through
    if holder is not None and not holder.same_process(me):
      return end(f"{path} is now held by {holder}: this run was stalled, and another has taken its workdir")
    count += 1
    with contextlib.suppress(OSError):  # a full disk: the next beat may get through
      write_file(path, json.dumps(dataclasses.asdict(dataclasses.replace(me, beat=count))).encode())


def _end_process(line: str) -> None:
  """Ends at once: whatever this run still wrote would be written between another's files."""
  print(f"{distributed.label()}error: {line}", file=sys.stderr, flush=True)
  os._exit(distributed.LOST)


def _read(path: pathlib.Path) -> Holder | None:
  """The lock's holder, None where there is no lock; a lock that cannot be read (now) has an unknown holder."""
  try:
    written = path.stat().st_mtime_ns
    try:
      fields = json.loads(path.read_text(encoding="utf-8"))
      holder = Holder(**{field.name: fields[field.name] for field in dataclasses.fields(Holder)})
    except (ValueError, TypeError, KeyError, RecursionError, PermissionError):
      return Holder(beat=written)
    good = all(isinstance(getattr(holder, field.name), type(field.default)) for field in dataclasses.fields(Holder))
    return holder if good else Holder(beat=written)
  except FileNotFoundError:
    return None
  except OSError:
    return Holder()


def _machine() -> str:
  """What tells this machine, or container, from others that share its file system, and even its name."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return platform.node()


def _start_of_process(pid: int) -> str | None:
  """When a process of this machine began, as its kernel counts; None where there is no such process."""
  try:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]
  except (OSError, IndexError):
    pass
  try:
    os.kill(pid, 0)  # no /proc: whether a process of this number is alive
  except (ProcessLookupError, OverflowError):
    return None
  except PermissionError:
    pass
  return ""
