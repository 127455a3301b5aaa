"""One run at a time in a workdir: a lock that its holder keeps alive, and that a crash does not leave behind for ever.

The lock is a file, `workdir/run.lock`, opened with O_EXCL, so that only one of several runs can make it. It names host, process
and start time, and its holder writes it anew every BEAT_S seconds, so that it also works on network file systems and mounted
buckets, where `flock` may not.
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
SILENCE_S = 60.0  # after so many seconds without one, the holder on another host counts as gone


class WorkdirInUse(UserError):
  """Another run that is still alive has the workdir."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
  """Who holds a lock. born: what tells its process from a later one of the same number; beat: counts its signs of life."""

  host: str
  pid: int
  born: str
  since: str
  beat: int = 0

  def __str__(self) -> str:
    return f"process {self.pid} on {self.host}, since {self.since}"

  def same_process(self, other: "Holder") -> bool:
    return (self.host, self.pid, self.born) == (other.host, other.pid, other.born)


@contextlib.contextmanager
def workdir_lock(
  workdir: str, *, say: Callable[[str], None], end: Callable[[str], None] = lambda line: _end_process(line)
) -> Iterator[None]:
  """Holds the workdir's lock; one process of a run takes it, before anything is written there.

  A lock is broken, with a line, when its process is gone: at once on this host, after SILENCE_S seconds without a sign of life on
  another one. A holder that finds another's lock in the place of its own (it was stalled for so long that it counted as gone)
  never writes over it: `end` gets a line, and by default ends the process with status LOST.

  Raises:
    WorkdirInUse: a run that is alive holds it. UserError: the workdir cannot be written.
  """
  path = pathlib.Path(workdir) / NAME
  me = Holder(host=platform.node(), pid=os.getpid(), born=_birth(os.getpid()) or "", since=time.strftime("%Y-%m-%d %H:%M:%S"))
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
      if not path.exists():
        continue  # it has just been released
      say(f"{path} cannot be read: broken")
    elif holder.host == me.host:
      if _birth(holder.pid) == holder.born and not holder.same_process(me):
        raise _in_use(path, holder)
      say(f"{path} was left by {holder}, which is gone: broken")
    else:
      _wait_for_silence(path, holder, say)
      say(f"{path} was left by {holder}, which gave no sign of life for {SILENCE_S:g} s: broken")
    _break(path, holder)


def _break(path: pathlib.Path, holder: Holder | None) -> None:
  """Removes the lock of `holder`, and no other's that may have taken its place in the meantime."""
  aside = path.with_name(f".{NAME}.{uuid.uuid4().hex[:12]}.tmp")
  with contextlib.suppress(FileNotFoundError):
    os.rename(path, aside)
    if holder is not None and _read(aside) != holder and not path.exists():
      os.rename(aside, path)
    aside.unlink(missing_ok=True)


def _in_use(path: pathlib.Path, holder: Holder) -> WorkdirInUse:
  return WorkdirInUse(
    f"--workdir={path.parent}: another run has it ({holder}); expected a workdir that no run is using: wait for its end, or "
    "give another"
  )


def _wait_for_silence(path: pathlib.Path, holder: Holder, say: Callable[[str], None]) -> None:
  """Returns once the holder has been silent for SILENCE_S. Two hosts' clocks differ, so its beats are watched, not its times."""
  say(f"{path} is held by {holder}: waiting up to {SILENCE_S:g} s for a sign of life")
  deadline = time.monotonic() + SILENCE_S
  while time.monotonic() < deadline:
    time.sleep(min(1.0, SILENCE_S / 10))
    now = _read(path)
    if now is None:
      return
    if now != holder:
      raise _in_use(path, now)


def _create(path: pathlib.Path, me: Holder) -> bool:
  """Makes the lock file, whole, unless there is one."""
  content = json.dumps(dataclasses.asdict(me)).encode()
  try:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
  except FileExistsError:
    return False
  with open(handle, "wb") as file:
    file.write(content)
  return True


def _beat(path: pathlib.Path, me: Holder, released: threading.Event, end: Callable[[str], None]) -> None:
  count = 0
  while not released.wait(BEAT_S):
    holder = _read(path)
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
  """The lock's holder; None where there is no lock. A lock that is being written is read again for a moment."""
  for _ in range(20):
    try:
      return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
      return None
    except (OSError, ValueError, TypeError):
      time.sleep(0.05)
  return None


def _birth(pid: int) -> str | None:
  """When a process of this machine began, as its kernel counts; None where there is no such process."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return None if fields[0] == "Z" else f"{boot}:{fields[19]}"
  except (OSError, IndexError):
    pass
  try:
    os.kill(pid, 0)  # no /proc: whether a process of this number is alive
  except ProcessLookupError:
    return None
  except PermissionError:
    pass
  return ""
