"""Records in buckets (gs://, s3://, any protocol of fsspec), fetched ahead of need by byte ranges.

`nfnets.data.storage.remote` has the calls themselves, what is tried again and what is an error at once.
"""

import collections
import dataclasses
import threading
from collections.abc import Sequence

from nfnets.data.errors import DataError
from nfnets.data.storage import remote

GAP = 256 << 10  # bytes; records closer than this are fetched together: as many bytes pass within one round trip
BUFFER = 128 << 20  # bytes fetched or in flight that nobody has read yet


@dataclasses.dataclass(slots=True, eq=False)
class _Range:
  """One request: bytes [start, end) of a file, and the records in it. hint: the call that asked for it.

  state: "queued", "flying" or "done".
  """

  hint: int
  file: int
  start: int
  end: int
  records: list[tuple[int, int, int]]
  state: str = "queued"

  @property
  def size(self) -> int:
    return self.end - self.start


@dataclasses.dataclass(slots=True, eq=False)
class _Entry:
  """A record that was asked for ahead. uses: how often it will be read."""

  range: _Range
  uses: int = 0
  data: bytes | None = None
  error: Exception | None = None


class BucketReader:
  """Reads records by (file, offset, length), most of them fetched ahead. Every method may be called from any thread.

  files: URLs, all of one protocol. threads: requests under way at once. buffer: bytes fetched ahead and not yet read, those
  in flight included. Raises DataError as the module says, and when a file ends before the record does.
  """

  def __init__(self, files: Sequence[str], *, threads: int = remote.THREADS, buffer: int = BUFFER):
    self.files = tuple(files)
    self._buffer = buffer
    self._filesystem = remote.open_filesystem(self.files[0])[0] if self.files else None
    self._paths = [self._filesystem._strip_protocol(file) for file in self.files]
    self._calls = remote.Calls()
    self._lock = threading.Lock()
    self._work = threading.Condition(self._lock)  # workers: the queue or the room has changed
    self._done = threading.Condition(self._lock)  # readers: a range has arrived
    self._queue: collections.deque[_Range] = collections.deque()
    self._entries: dict[tuple[int, int, int], _Entry] = {}  # in the order asked for
    self._bytes = 0  # flying ranges, and records that arrived and were not read
    self._hints = 0
    self._size = threads
    self._threads: list[threading.Thread] = []
    self._closed = False

  def read(self, file: int, offset: int, length: int) -> bytes:
    """The bytes; waits for them when they are on their way; fetches them itself when that has not begun."""
    key = file, offset, length
    with self._lock:
      entry, mine = self._entries.get(key), None
      if entry is not None and entry.range.state == "queued":
        if self._make_room(entry.range):
          mine = entry.range
          self._queue.remove(mine)
          self._begin(mine)
        else:
          self._leave_out(key)
          entry = None
    try:
      if entry is None:
        return self._cut(self._fetch(file, offset, offset + length), offset, key)
      if mine is not None:
        self._carry_out(mine)
    except remote.Closed:
      raise DataError(f"{self.files[file]}: closed while reading") from None
    with self._lock:
      while entry.range.state != "done" and not self._closed:
        self._done.wait()
      if self._closed:
        raise DataError(f"{self.files[file]}: closed while reading")
      entry.uses -= 1
      if entry.uses <= 0 and self._entries.get(key) is entry:
        self._drop(key)
    if isinstance(entry.error, DataError):
      raise DataError(str(entry.error)) from entry.error
    if entry.error is not None:
      raise entry.error
    return entry.data

  def prefetch(self, requests: Sequence[tuple[int, int, int]]) -> None:
    """Asks for (file, offset, length) in the order of need, and returns at once.

    Neighbours among `requests` are fetched together, so ask for whole blocks. A record is fetched once and kept until it was
    read as often as it was asked for. What does not fit the buffer waits.
    """
    with self._lock:
      if self._closed:
        return
      uses = collections.Counter((int(file), int(offset), int(length)) for file, offset, length in requests)
      new = {key: rank for rank, key in enumerate(uses) if key not in self._entries and key[2] <= self._buffer}
      for key in uses.keys() & self._entries.keys():
        self._entries[key].uses += uses[key]
      self._hints += 1
      ranges: list[_Range] = []
      for file, offset, length in sorted(new):
        last, end = ranges[-1] if ranges else None, offset + length
        if last and last.file == file and 0 <= offset - last.end < GAP and end - last.start <= min(remote.BLOCK, self._buffer):
          last.end = end
          last.records.append((file, offset, length))
        else:
          ranges.append(_Range(self._hints, file, offset, end, [(file, offset, length)]))
      for part in sorted(ranges, key=lambda part: min(new[key] for key in part.records)):
        self._queue.append(part)
        for key in part.records:
          self._entries[key] = _Entry(part, uses[key])
      if self._queue and not self._threads:
        self._threads = [threading.Thread(target=self._run, name=f"bucket-{i}", daemon=True) for i in range(self._size)]
        for thread in self._threads:
          thread.start()
      self._work.notify_all()

  def close(self) -> None:
    """Cancels what is under way and ends the threads; may be called twice."""
    with self._lock:
      self._closed = True
      self._queue.clear()
      self._entries.clear()
      self._bytes = 0
      self._work.notify_all()
      self._done.notify_all()
    self._calls.close()
    for thread in self._threads:
      thread.join()

  def _make_room(self, part: _Range) -> bool:
    # `part` is needed although earlier hints fill the buffer, so these are likely never read (a run that jumped elsewhere):
    # kept, they would hold up prefetching for ever.
    for key in [key for key, old in self._entries.items() if old.range.state == "done" and old.range.hint < part.hint]:
      if self._bytes + part.size <= self._buffer:
        break
      self._drop(key)
    return self._bytes + part.size <= self._buffer

  def _leave_out(self, key) -> None:
    part = self._entries.pop(key).range
    part.records.remove(key)
    if not part.records:
      self._queue.remove(part)
      self._work.notify_all()

  def _drop(self, key) -> None:
    entry = self._entries.pop(key)
    if entry.data is not None:
      self._bytes -= key[2]
      self._work.notify()

  def _run(self) -> None:
    while True:
      with self._lock:
        while not self._closed and not (self._queue and (self._bytes + self._queue[0].size <= self._buffer)):
          self._work.wait()
        if self._closed:
          return
        part = self._queue.popleft()
        self._begin(part)
      try:
        self._carry_out(part)
      except remote.Closed:
        return

  def _begin(self, part: _Range) -> None:
    part.state = "flying"
    self._bytes += part.size

  def _carry_out(self, part: _Range) -> None:
    data, error = b"", None
    try:
      data = self._fetch(part.file, part.start, part.end)
    except remote.Closed:
      raise
    except Exception as failure:  # handed to whoever reads the records
      error = failure
    results = {key: self._try_cut(data, part.start, key) if error is None else (None, error) for key in part.records}
    with self._lock:
      if self._closed:
        raise remote.Closed
      part.state = "done"
      self._bytes -= part.size
      for key, (record, failure) in results.items():
        entry = self._entries[key]
        entry.data, entry.error = record, failure
        self._bytes += key[2] if record is not None else 0
      self._done.notify_all()
      self._work.notify_all()

  def _fetch(self, file: int, start: int, end: int) -> bytes:
    if self._closed:
      raise DataError(f"{self.files[file]}: read after close()")
    if start == end:
      return b""
    return self._calls(self._filesystem, self.files[file], "cat_file", self._paths[file], start=start, end=end)

  def _try_cut(self, data: bytes, start: int, key) -> tuple[bytes | None, Exception | None]:
    try:
      return self._cut(data, start, key), None
    except DataError as error:
      return None, error

  def _cut(self, data: bytes, start: int, key) -> bytes:
    file, offset, length = key
    if offset - start + length > len(data):
      raise DataError(
        f"{self.files[file]}: ends at byte {start + len(data)}, before the {length} bytes at {offset} "
        "do: truncated, or replaced since it was indexed"
      )
    return data[offset - start : offset - start + length]
