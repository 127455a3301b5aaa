"""Buckets: what is fetched together, kept, tried again and refused. memory:// for all but one test against an S3 server."""

import json
import os
import threading
import time
import uuid

import numpy as np
import pytest
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem

from nfnets.data.errors import DataError
from nfnets.data.storage import buckets, remote


class Flaky(MemoryFileSystem):
  """memory:// that counts requests, holds them back until `gate` is set, and raises the next of `failures`."""

  protocol = "flaky"
  requests: list = []
  failures: list = []
  gate = threading.Event()

  @classmethod
  def _strip_protocol(cls, path):
    return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

  def cat_file(self, path, start=None, end=None, **options):
    Flaky.requests.append((path, start, end))
    assert Flaky.gate.wait(10)
    if Flaky.failures:
      raise Flaky.failures.pop(0)
    return super().cat_file(path, start=start, end=end, **options)


@pytest.fixture
def shard(monkeypatch):
  """URL of 4 MB of noise, and its bytes."""
  register_implementation("flaky", Flaky, clobber=True)
  Flaky.requests.clear()
  Flaky.failures.clear()
  Flaky.gate.set()
  monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("nothing here may sleep"))
  name, data = uuid.uuid4().hex, np.random.default_rng(0).bytes(4 << 20)
  MemoryFileSystem().pipe_file(f"/{name}/x-00000", data)
  return f"flaky://{name}/x-00000", data


@pytest.fixture
def reader(shard):
  made = buckets.BucketReader([shard[0]], threads=4, buffer=2 << 20)
  yield made
  made.close()
  assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("bucket-")]


def _records(n, size=1000, start=0):
  return [(0, start + i * size, size) for i in range(n)]


def _check(reader, data, keys):
  assert all(reader.read(*key) == data[key[1] : key[1] + key[2]] for key in keys)


def _settle(reader):
  deadline = time.monotonic() + 5
  while reader._queue and reader._bytes + reader._queue[0].size <= reader._buffer and time.monotonic() < deadline:
    threading.Event().wait(0.01)
  while any(entry.range.state == "fetching" for entry in list(reader._entries.values())) and time.monotonic() < deadline:
    threading.Event().wait(0.01)


def test_neighbours_are_fetched_together_in_the_order_of_need(shard):
  reader = buckets.BucketReader([shard[0]], threads=1)
  near, far = _records(50), _records(20, start=1_000_000)
  keys = [far[3], *near[::-2], *far[:3], far[10]]
  reader.prefetch(keys)
  _settle(reader)
  _check(reader, shard[1], keys)
  assert [request[1:] for request in Flaky.requests] == [(1_000_000, 1_011_000), (1_000, 50_000)]
  assert reader._bytes == 0 and not reader._entries
  _check(reader, shard[1], keys[:1])  # dropped after one read: fetched again, alone
  assert Flaky.requests[2:] == [(Flaky.requests[0][0], 1_003_000, 1_004_000)]
  reader.close()


def test_a_request_is_no_larger_than_the_block_unless_a_record_is(shard, monkeypatch):
  monkeypatch.setattr(remote, "BLOCK", 10_000)
  reader = buckets.BucketReader([shard[0]])
  keys = _records(25) + [(0, 25_000, 30_000)]
  reader.prefetch(keys)
  _check(reader, shard[1], keys)
  reader.close()
  assert sorted(request[1:] for request in Flaky.requests) == [(0, 10_000), (10_000, 20_000), (20_000, 25_000), (25_000, 55_000)]


def test_a_record_is_kept_as_often_as_it_was_asked_for(reader, shard):
  key = (0, 5, 7)
  reader.prefetch([key, key])
  reader.prefetch([key])
  _check(reader, shard[1], [key] * 3)
  assert len(Flaky.requests) == 1 and not reader._entries


def test_the_buffer_is_bounded_and_what_is_never_read_makes_room(reader, shard):
  stale = [(0, i << 19, 100_000) for i in range(8)]  # half a megabyte apart: a request each
  reader.prefetch([*stale, *_records(4, 500_000, start=1)])  # 2.8 MB asked for, 2 MB allowed
  _settle(reader)
  assert 1_800_000 <= reader._bytes <= 2 << 20
  waiting = [key for key, entry in reader._entries.items() if entry.range.state == "queued"]
  assert waiting
  _check(reader, shard[1], waiting + stale)
  reader.prefetch([(0, 0, 3 << 20)])  # larger than the buffer: not ahead, but read
  _check(reader, shard[1], [(0, 0, 3 << 20)])
  for start in range(0, 4_000_000, 100_000):  # nobody reads these; later ones still get in
    reader.prefetch([(0, start, 99_999)])
  _check(reader, shard[1], [(0, start, 99_999) for start in range(3_000_000, 4_000_000, 100_000)])
  assert reader._bytes <= 2 << 20


def test_a_window_larger_than_the_buffer_is_not_fetched_twice(reader, shard, monkeypatch):
  monkeypatch.setattr(buckets, "GAP", 1000)
  keys = [(0, i * 500_000, 400_000) for i in range(8)]  # 3.2 MB asked for in one hint, 2 MB allowed
  reader.prefetch(keys)
  _settle(reader)
  _check(reader, shard[1], keys[::-1])
  assert len(Flaky.requests) == len(keys) and reader._bytes == 0


def test_many_threads_read_what_is_still_on_its_way(reader, shard):
  keys = [(0, int(i) * 4000, 3999) for i in np.random.default_rng(1).permutation(1000)]
  Flaky.gate.clear()
  parts = {}

  def read(part):
    for key in part:
      parts[key] = reader.read(*key)

  reader.prefetch(keys[:600])
  threads = [threading.Thread(target=read, args=(keys[i::8],)) for i in range(8)]
  for thread in threads:
    thread.start()
  reader.prefetch(keys[600:])
  Flaky.gate.set()
  for thread in threads:
    thread.join(10)
  assert parts == {key: shard[1][key[1] : key[1] + key[2]] for key in keys}
  assert reader._bytes == 0


@pytest.mark.parametrize("failure", [TimeoutError("slow"), ConnectionResetError("gone"), OSError("503 Slow Down")])
def test_what_may_pass_is_tried_again(reader, shard, failure):
  Flaky.failures += [failure, failure]
  reader.prefetch(_records(3))
  _check(reader, shard[1], _records(3))
  assert len(Flaky.requests) == 3


def test_given_up_after_a_while(reader, shard, monkeypatch):
  monkeypatch.setattr(remote, "RETRY_SECONDS", 0.2)
  Flaky.failures += [TimeoutError("slow")] * 99
  with pytest.raises(DataError, match=r"flaky://\w+/x-00000: given up after \d tries .*TimeoutError: slow"):
    reader.read(0, 0, 10)


@pytest.mark.parametrize(
  ("failure", "message"),
  [
    (PermissionError("Access\nDenied"), r"x-00000: refused \(PermissionError: Access Denied\)"),
    (OSError("Forbidden: x"), "x-00000: refused"),
    (type("NoCredentialsError", (Exception,), {})("none"), r"x-00000: no credentials \(NoCredentialsError: none\)"),
    (FileNotFoundError("x"), "x-00000: no such file, directory or bucket"),
    (OSError(22, "bad"), "x-00000: OSError"),
  ],
)
def test_what_a_person_must_mend_is_an_error_at_once(reader, failure, message):
  Flaky.failures.append(failure)
  reader.prefetch(_records(2))
  for key in _records(2):
    with pytest.raises(DataError, match=message) as caught:
      reader.read(*key)
    assert "\n" not in str(caught.value)
  assert len(Flaky.requests) == 1


def test_mistakes_of_the_program_are_not_hidden(reader):
  Flaky.failures.append(TypeError("mistake"))
  with pytest.raises(TypeError, match="mistake"):
    reader.read(0, 0, 10)


def test_a_file_that_ends_early_costs_only_the_records_beyond(reader, shard):
  keys = [(0, len(shard[1]) - 100, 100), (0, len(shard[1]) - 50, 100)]
  reader.prefetch(keys)
  _check(reader, shard[1], keys[:1])
  with pytest.raises(DataError, match=f"ends at byte {len(shard[1])}"):
    reader.read(*keys[1])


def test_close_ends_everything_and_wakes_readers(shard):
  reader = buckets.BucketReader([shard[0]], threads=3)
  Flaky.gate.clear()
  reader.prefetch(_records(3))
  errors = []

  def read():
    try:
      reader.read(0, 0, 1000)
    except DataError as error:
      errors.append(str(error))

  waiting = threading.Thread(target=read)
  waiting.start()
  threading.Timer(0.05, Flaky.gate.set).start()
  reader.close()
  reader.close()
  waiting.join(5)
  assert errors and "close" in errors[0]
  assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("bucket-")]
  with pytest.raises(DataError, match="after close"):
    reader.read(0, 0, 10)


def test_close_does_not_wait_for_the_next_try(shard):
  reader = buckets.BucketReader([shard[0]])
  Flaky.failures += [TimeoutError("slow")] * 99
  reader.prefetch(_records(1))
  begin = time.monotonic()
  threading.Event().wait(0.5)
  reader.close()
  assert time.monotonic() - begin < 2


def test_directories_metadata_and_streams(tmp_path, monkeypatch):
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  root = f"memory://{uuid.uuid4().hex}"
  for version in ("2.0.0", "10.0.0", "9.1.0"):
    remote.write_file(f"{root}/photos/{version}/dataset_info.json", b"{}")
  for config in ("a", "b"):
    remote.write_file(f"{root}/sets/{config}/1.0.0/features.json", b"{}")
  remote.write_file(f"{root}/photos/10.0.0/label.labels.txt", b"cat\n")
  remote.write_file(f"{root}/photos/10.0.0/x-00000", bytes(range(250)))

  newest = remote.find_version(root + "/", "photos")
  assert newest == f"{root}/photos/10.0.0" and remote.find_version(root, "photos:9.*.*") == f"{root}/photos/9.1.0"
  assert remote.list_files(newest) == [f"{newest}/{name}" for name in ("dataset_info.json", "label.labels.txt", "x-00000")]
  local = remote.copy_metadata(newest, 1 << 20)
  assert sorted(os.listdir(local)) == ["dataset_info.json", "label.labels.txt"]
  assert [len(block) for block in remote.stream(f"{newest}/x-00000", block=100)] == [100, 100, 50]
  assert b"".join(remote.stream(f"{newest}/x-00000", block=7)) == bytes(range(250))

  ((size, stamp),) = remote.stat_files([f"{newest}/x-00000"])
  remote.write_file(f"{newest}/x-00000", bytes(250))
  assert size == 250 and remote.stat_files([f"{newest}/x-00000"])[0] != (size, stamp)

  assert remote.find_version(root, "sets/b") == f"{root}/sets/b/1.0.0"
  with pytest.raises(DataError, match="several configurations; name one of them: a, b"):
    remote.find_version(root, "sets")
  remote.write_file(f"{root}/sets/.config/metadata.json", json.dumps({"default_config_name": "b"}).encode())
  assert remote.find_version(root, "sets") == f"{root}/sets/b/1.0.0"
  for wrong, message in (("photo", r"no such dataset \(in .*: photos, sets\)"), ("photos:3.0.0", "no version 3.0.0")):
    with pytest.raises(DataError, match=message):
      remote.find_version(root, wrong)
  with pytest.raises(DataError, match="not a prepared TFDS dataset"):
    remote.copy_metadata(f"{root}/sets/b/1.0.0", 1 << 20)
  with pytest.raises(DataError, match="no such file"):
    remote.stat_files([f"{newest}/x-00001"])


def test_what_is_missing_is_named(monkeypatch):
  def missing(url, **options):
    raise ImportError("Install s3fs to access S3")

  with pytest.raises(DataError, match="Protocol not known: nothing"):
    remote.list_files("nothing://bucket")
  monkeypatch.setattr("fsspec.core.url_to_fs", missing)
  with pytest.raises(DataError, match="pip install s3fs"):
    remote.list_files("s3://bucket")


def test_against_an_s3_server(monkeypatch):
  server_module, s3fs = pytest.importorskip("moto.server"), pytest.importorskip("s3fs")
  monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
  monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
  server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
  server.start()
  try:
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    data, url = np.random.default_rng(0).bytes(1 << 20), "s3://bucket/data/photos/1.0.0"
    s3fs.S3FileSystem(config_kwargs={"max_pool_connections": 2 * remote.THREADS}).mkdir("bucket")
    remote.write_file(f"{url}/x-00000", data)
    remote.write_file(f"{url}/dataset_info.json", b"{}")
    assert remote.find_version("s3://bucket/data", "photos") == url
    assert remote.stat_files([f"{url}/x-00000"])[0][0] == len(data)
    assert b"".join(remote.stream(f"{url}/x-00000", block=300_000)) == data
    reader = buckets.BucketReader([f"{url}/x-00000", f"{url}/x-00001"])
    keys = [(0, int(i) * 1000, 1000) for i in np.random.default_rng(1).permutation(1000)]
    reader.prefetch(keys)
    _check(reader, data, keys)
    with pytest.raises(DataError, match="x-00001: no such file"):
      reader.read(1, 0, 10)
    with pytest.raises(DataError, match="s3://else/where: no such file, directory or bucket"):
      remote.list_files("s3://else/where")
    reader.close()
  finally:
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()
