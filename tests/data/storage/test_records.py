import concurrent.futures
import os
import pathlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from nfnets.data.errors import DataError
from nfnets.data.storage import tfrecord
from nfnets.data.storage.example import parse_example
from nfnets.data.storage.index import _read_ascending, load_index
from tests import shards

PAYLOADS = [[b"a", b"", b"long" * 1000], [b"bc"], [bytes([i]) * i for i in range(40)]]


@pytest.fixture
def files(tmp_path):
  for i, payloads in enumerate(PAYLOADS):
    shards.write_shard(tmp_path / f"set-train.tfrecord-{i:05d}-of-00003", payloads)
  return sorted(map(str, tmp_path.glob("set-*")))


@pytest.fixture
def lines():
  return []


def payloads_of(index):
  reader = tfrecord.FileReader(index.files)
  try:
    return [reader.read(*map(int, row)) for row in zip(index.file, index.offset, index.length, strict=True)]
  finally:
    reader.close()


def test_index_finds_every_payload_and_is_kept(files, tmp_path, lines):
  cache = tmp_path / "deep" / "cache"
  first = load_index(files, cache_dir=str(cache), progress=lines.append)
  assert payloads_of(first) == sum(PAYLOADS, [])
  assert first.counts().tolist() == [3, 1, 40] and len(first) == 44
  assert lines == ["indexing 3 shards of set-train (once)"]
  again = load_index(files, cache_dir=str(cache), progress=lines.append)
  assert len(lines) == 1
  for field in ("file", "offset", "length"):
    np.testing.assert_array_equal(getattr(again, field), getattr(first, field))
  assert (again.file.dtype, again.offset.dtype, again.length.dtype) == (np.int32, np.int64, np.int64)
  assert [path.suffix for path in cache.iterdir()] == [".npz"]


def test_a_stale_or_damaged_index_is_built_again(files, tmp_path, lines):
  cache = tmp_path / "cache"
  read = lambda: payloads_of(load_index(files, cache_dir=str(cache), progress=lines.append))
  read()
  shards.write_shard(tmp_path / os.path.basename(files[1]), [b"de", b"f"])
  changed = PAYLOADS[0] + [b"de", b"f"] + PAYLOADS[2]
  assert read() == changed
  assert "a shard has changed" in lines[1]
  os.utime(files[0], ns=(1, 1))
  assert read() == changed and len(lines) == 3
  (kept,) = cache.iterdir()
  kept.write_bytes(kept.read_bytes()[:200])
  assert read() == changed
  assert "cannot be read" in lines[3]
  assert read() == changed and len(lines) == 4


def test_without_a_cache_it_says_so_and_works(files, tmp_path, lines):
  (tmp_path / "file").write_text("")
  index = load_index(files, cache_dir=str(tmp_path / "file"), progress=lines.append)
  assert payloads_of(index) == sum(PAYLOADS, [])
  assert "cannot keep the index" in lines[1] and len(lines) == 2


def broken(path, change):
  path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("cut, byte", [(1, 33), (4, 33), (4000, 33), (4015, 33), (4016 + 15, 17), (4016 + 16 + 3, 0)])
def test_a_truncated_shard_is_named_with_the_byte(files, tmp_path, cut, byte):
  broken(tmp_path / os.path.basename(files[0]), lambda data: data[:-cut])
  size = os.path.getsize(files[0])
  with pytest.raises(DataError, match=rf"{files[0]} is truncated: record \d at byte {byte} goes beyond .* byte {size}$"):
    load_index(files, cache_dir=str(tmp_path / "cache"), progress=print)


def test_other_broken_shards(files, tmp_path):
  load = lambda: load_index(files, cache_dir=str(tmp_path / "cache"), progress=lambda line: None)
  shard = tmp_path / os.path.basename(files[0])
  whole = shard.read_bytes()
  shard.write_bytes(whole[:17] + b"\x01" + whole[18:])
  with pytest.raises(DataError, match="damaged at byte 17: the checksum of the length of record 2 is wrong"):
    load()
  shard.write_bytes(b"not a TFRecord file at all")
  with pytest.raises(DataError, match="is no TFRecord file, or damaged, at byte 0"):
    load()
  shard.write_bytes(b"")
  with pytest.raises(DataError, match=r"is empty \(0 bytes\)"):
    load()
  shard.unlink()
  with pytest.raises(DataError, match=f"shard {shard} cannot be read: No such file"):
    load()
  shard.mkdir()
  with pytest.raises(DataError, match=f"shard {shard} cannot be read: it is no regular file"):
    load()


def test_an_unreadable_shard(files, tmp_path, monkeypatch):
  monkeypatch.setattr(os, "access", lambda path, mode: path != files[2])  # root may read anything
  with pytest.raises(DataError, match=f"shard {files[2]} cannot be read: Permission denied"):
    load_index(files, cache_dir=str(tmp_path), progress=print)


def test_a_stream_of_blocks_is_scanned_like_a_file(files):
  data = pathlib.Path(files[2]).read_bytes()
  expected = [len(payload) for payload in PAYLOADS[2]]
  for block in (1, 7, 64, 10**6):
    read = _read_ascending(iter([data[at : at + block] for at in range(0, len(data), block)]))
    assert tfrecord.scan("x", len(data), read).tolist() == expected


def test_a_short_read_is_an_error(files):
  reader = tfrecord.FileReader(files)
  with pytest.raises(OSError, match="ends at byte 18, 82 bytes too early"):
    reader.read(1, 0, 100)
  reader.close()


def test_many_threads_read_and_nothing_stays_open(files, monkeypatch):
  index = load_index(files, cache_dir="/dev/null/none", progress=lambda line: None)
  before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
  reader = tfrecord.FileReader(index.files)
  reader._max_open = 1  # the other files are opened for each read
  rows = [[*map(int, row)] for row in zip(index.file, index.offset, index.length, strict=True)] * 50
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(lambda row: reader.read(*row), rows)) == sum(PAYLOADS, []) * 50
  reader.close()
  reader.close()
  assert before is None or len(os.listdir("/proc/self/fd")) == before
  with pytest.raises(OSError, match="after its reader was closed"):
    reader.read(0, 0, 1)


def test_checksums():
  # The CRC-32C of "123456789" is 0xE3069283 (RFC 3720); the masking is TensorFlow's.
  assert tfrecord.masked_crc(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF
  record = shards.framed(b"payload")
  tfrecord.check_crc(record)
  for at in range(len(record)):
    with pytest.raises(ValueError, match="its (length|bytes)"):
      tfrecord.check_crc(record[:at] + bytes([record[at] ^ 4]) + record[at + 1 :])
  with pytest.raises(ValueError):
    tfrecord.check_crc(record[:10])


def reference():
  from tensorflow_datasets.proto import tf_example_pb2

  return tf_example_pb2.Example()


@settings(max_examples=60, deadline=None)
@given(
  image=st.binary(max_size=300),
  label=st.integers(-(2**63), 2**63 - 1),
  packed=st.booleans(),
  others=st.dictionaries(
    st.text(max_size=3),
    st.one_of(st.lists(st.binary(max_size=3)), st.lists(st.integers(0, 2**63 - 1)), st.lists(st.floats(width=32))),
  ),
)
def test_parse_agrees_with_protobuf(image, label, packed, others):
  message = reference()
  feature = message.features.feature
  for key, values in others.items():
    kind = {bytes: "bytes_list", float: "float_list"}.get(type(values[0]) if values else int, "int64_list")
    getattr(feature[key], kind).value.extend(values)
  feature["image"].bytes_list.value.append(image)
  feature["label"].int64_list.value.append(label)
  assert parse_example(message.SerializeToString(), ("image", "label")) == {"image": image, "label": label}
  ours = shards.example(packed=packed, image=image, label=label)
  assert parse_example(ours, ("label", "image")) == {"image": image, "label": label}
  assert reference().FromString(ours).features.feature["label"].int64_list.value == [label]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_raise_nothing_but_value_error(data):
  whole = shards.example(file_name=b"x" * 200, image=b"image" * 40, label=300)
  at = data.draw(st.integers(0, len(whole) - 1))
  damaged = data.draw(
    st.one_of(
      st.just(whole[:at]),
      st.binary(max_size=40),
      st.integers(0, 255).map(lambda byte: whole[:at] + bytes([byte]) + whole[at + 1 :]),
    )
  )
  try:
    features = parse_example(damaged, ("image", "label"))
  except ValueError:
    return
  assert isinstance(features["image"], bytes | int) and isinstance(features["label"], bytes | int)


@pytest.mark.parametrize(
  "features, message",
  [
    (dict(image=b"x"), "it has no feature 'label'"),
    (dict(image=[b"x", b"y"], label=1), "its feature 'image' holds more than one value, not one"),
    (dict(image=b"x", label=[]), "its feature 'label' holds no value, not one"),
  ],
)
def test_what_a_wrong_example_is_told(features, message):
  with pytest.raises(ValueError, match=message):
    parse_example(shards.example(**features), ("image", "label"))


def test_floats_and_unknown_fields():
  floats = shards.field(1, shards.field(1, shards.field(1, b"label") + shards.field(2, shards.field(2, struct.pack("<f", 1)))))
  with pytest.raises(ValueError, match="holds floats"):
    parse_example(floats, ("label",))
  fixed = shards.varint(9 << 3 | 1) + bytes(8) + shards.varint(10 << 3 | 5) + bytes(4) + shards.varint(11 << 3) + b"\x05"
  assert parse_example(fixed + shards.example(label=3) + shards.field(99, b"?"), ("label",)) == {"label": 3}
