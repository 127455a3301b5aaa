"""Records in buckets (gs://, s3://, any protocol of fsspec), fetched ahead of need by byte ranges.

`nfnets.data.storage.remote` makes the calls, and says which failures are tried again and which are errors at once.
"""

import collections
import dataclasses
import threading
from collections.abc import Iterable, Sequence

from nfnets.data.errors import DataError
from nfnets.data.storage import remote

GAP = 256 << 10  # bytes; records closer than this are fetched together: as many bytes pass within one round trip
BUFFER = 128 << 20  # bytes fetched or in flight that nobody has read yet

Key = tuple[int, int, int]  # of a record: file, offset in bytes, length in bytes


@dataclasses.dataclass(slots=True, eq=False)
class _Range:
  """A request for bytes [start, end) of a file, and the records in them.

  hint: the number of the call of `prefetch` that asked for them. state: "queued", "fetching" or "done".
  """

  hint: int
  file: int
  start: int
  end: int
  records: list[Key]
  state: str = "queued"

  @property
  def size(self) -> int:
    return self.end - self.start


@dataclasses.dataclass(slots=True, eq=False)
class _Entry:
  """A record that was asked for ahead. uses: how often it will be read; result: None until its range is done."""

  range: _Range
  uses: int = 0
  result: bytes | Exception | None = None


class BucketReader:
  """Reads records by (file, offset, length), most of them fetched ahead. Every method may be called from any thread.

  Args:
    files: URLs, at least one, all of the same protocol.
    threads: the number of requests in flight at once.
    buffer: bytes that were fetched ahead and not yet read, those in flight included.

  Raises:
    DataError: the library for the protocol is missing.
  """

  def __init__(self, files: Sequence[str], *, threads: int = remote.THREADS, buffer: int = BUFFER):
    self.files = tuple(files)
    self._buffer = buffer
    self._filesystem = remote.open_filesystem(self.files[0])[0]
    self._paths = [self._filesystem._strip_protocol(file) for file in self.files]
    self._calls = remote.Calls()
    self._lock = threading.Lock()
    self._work = threading.Condition(self._lock)  # the fetching threads wait for ranges in the queue and room in the buffer
    self._done = threading.Condition(self._lock)  # readers wait for a range to be done
    self._queue: collections.deque[_Range] = collections.deque()
    self._entries: dict[Key, _Entry] = {}  # in the order asked for
    self._bytes = 0  # of the ranges in flight, and of the records that arrived and were not read
    self._hints = 0
    self._size = threads
    self._threads: list[threading.Thread] = []
    self._closed = False

  def read(self, file: int, offset: int, length: int) -> bytes:
    """Returns a record's bytes; waits for those in flight, and fetches itself those whose request has not begun.

    Raises:
      DataError: the bucket cannot be read, the file ends before the record does, or the reader was closed.
    """
    key = file, offset, length
    own_range = None
    with self._lock:
      entry = self._entries.get(key)
      if entry is not None and entry.range.state == "queued":
        if self._make_room(entry.range):
          own_range = entry.range
          self._queue.remove(own_range)
          self._mark_fetching(own_range)
        else:
          self._forget_queued(key)
          entry = None
    try:
      if entry is None:
        return self._extract(self._fetch(file, offset, offset + length), offset, key)
      if own_range is not None:
        self._fetch_range(own_range)
    except remote.Closed:
      raise DataError(f"{self.files[file]}: closed while reading") from None
    with self._lock:
      while entry.range.state != "done" and not self._closed:
        self._done.wait()
      result = entry.result
      if self._closed or result is None:
        raise DataError(f"{self.files[file]}: closed while reading")
      entry.uses -= 1
      if entry.uses <= 0 and self._entries.get(key) is entry:
        self._drop(key)
    if isinstance(result, DataError):
      raise DataError(str(result)) from result
    if isinstance(result, Exception):
      raise result
    return result

  def prefetch(self, requests: Sequence[Key]) -> None:
    """Asks for records (file, offset, length) in the order of need, and returns at once.

    Neighbours among `requests` are fetched together, so ask for whole blocks. A record is fetched once and kept until it
    was read as often as it was asked for. Records that do not fit the buffer wait until there is room.
    """
    with self._lock:
      if self._closed:
        return
      uses = collections.Counter((int(file), int(offset), int(length)) for file, offset, length in requests)
      ranks = {key: rank for rank, key in enumerate(uses) if key not in self._entries and key[2] <= self._buffer}
      for key in uses.keys() & self._entries.keys():
        self._entries[key].uses += uses[key]
      self._hints += 1
      for part in sorted(self._ranges_of(ranks), key=lambda part: min(ranks[key] for key in part.records)):
        self._queue.append(part)
        for key in part.records:
          self._entries[key] = _Entry(part, uses[key])
      if self._queue and not self._threads:
        self._threads = [threading.Thread(target=self._run, name=f"bucket-{i}", daemon=True) for i in range(self._size)]
        for thread in self._threads:
          thread.start()
      self._work.notify_all()

  def close(self) -> None:
    """Cancels the requests in flight and ends the threads; may be called twice."""
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

  # ---- the queue and the buffer; callers hold the lock

  def _ranges_of(self, keys: Iterable[Key]) -> list[_Range]:
    """Joins records that are close to each other into ranges of at most a block."""
    largest = min(remote.BLOCK, self._buffer)
    ranges: list[_Range] = []
    for file, offset, length in sorted(keys):
      last, end = ranges[-1] if ranges else None, offset + length
      if last and last.file == file and 0 <= offset - last.end < GAP and end - last.start <= largest:
        last.end = end
        last.records.append((file, offset, length))
      else:
        ranges.append(_Range(self._hints, file, offset, end, [(file, offset, length)]))
    return ranges

  def _make_room(self, part: _Range) -> bool:
    """Drops records of earlier hints until `part`, which a reader waits for, fits the buffer; whether it does."""
    # The records of earlier hints were not needed before `part`, so they are likely never read (the run jumped to another
    # step). If they stayed, nothing could be fetched ahead any more.
    stale = [key for key, entry in self._entries.items() if entry.range.state == "done" and entry.range.hint < part.hint]
    for key in stale:
      if self._bytes + part.size <= self._buffer:
        break
      self._drop(key)
    return self._bytes + part.size <= self._buffer

  def _forget_queued(self, key: Key) -> None:
    """Removes a record from its queued range, and the range when it has no other."""
    part = self._entries.pop(key).range
    part.records.remove(key)
    if not part.records:
      self._queue.remove(part)
      self._work.notify_all()

  def _drop(self, key: Key) -> None:
    """Removes a record that has arrived."""
    entry = self._entries.pop(key)
    if isinstance(entry.result, bytes):
      self._bytes -= key[2]
      self._work.notify()

  def _mark_fetching(self, part: _Range) -> None:
    part.state = "fetching"
    self._bytes += part.size

  # ---- fetching, without the lock

  def _run(self) -> None:
    """Fetches queued ranges until the reader is closed; the body of the threads."""
    while True:
      with self._lock:
        while not self._closed and not (self._queue and (self._bytes + self._queue[0].size <= self._buffer)):
          self._work.wait()
        if self._closed:
          return
        part = self._queue.popleft()
        self._mark_fetching(part)
      try:
        self._fetch_range(part)
      except remote.Closed:
        return

  def _fetch_range(self, part: _Range) -> None:
    """Fetches a range and hands its records, or the error, to the entries. Raises remote.Closed."""
    results: dict[Key, bytes | Exception]
    try:
      data = self._fetch(part.file, part.start, part.end)
      results = {key: self._try_extract(data, part.start, key) for key in part.records}
    except remote.Closed:
      raise
    except Exception as error:  # raised in the threads that read the records
      results = dict.fromkeys(part.records, error)
    with self._lock:
      if self._closed:
        raise remote.Closed
      part.state = "done"
      self._bytes -= part.size
      for key, result in results.items():
        self._entries[key].result = result
        self._bytes += key[2] if isinstance(result, bytes) else 0
      self._done.notify_all()
      self._work.notify_all()

  def _fetch(self, file: int, start: int, end: int) -> bytes:
    """Returns bytes [start, end) of files[file], fewer where it ends before."""
    if self._closed:
      raise DataError(f"{self.files[file]}: read after close()")
    if start == end:
      return b""
    return self._calls(self._filesystem, self.files[file], "cat_file", self._paths[file], start=start, end=end)

  def _try_extract(self, data: bytes, start: int, key: Key) -> bytes | DataError:
    try:
      return self._extract(data, start, key)
    except DataError as error:
      return error

  def _extract(self, data: bytes, start: int, key: Key) -> bytes:
    """Returns a record's bytes from `data`, which begins at byte `start` of the file."""
    file, offset, length = key
    if offset - start + length > len(data):
      raise DataError(
        f"{self.files[file]}: ends at byte {start + len(data)}, before the {length} bytes at {offset} "
        "do: truncated, or replaced since it was indexed"
      )
    return data[offset - start : offset - start + length]
