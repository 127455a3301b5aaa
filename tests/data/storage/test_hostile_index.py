"""A kept index is read back with care: whatever else lies in its place is said in a line, and the index is built again."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from nfnets.data.errors import DataError
from nfnets.data.storage.index import load_index
from tests import shards


@pytest.fixture
def files(tmp_path):
  paths = [tmp_path / f"set-train.tfrecord-{i:05d}-of-00002" for i in range(2)]
  for i, path in enumerate(paths):
    shards.write_shard(path, [b"x" * (10 * i + j) for j in range(3)])
  return [str(path) for path in paths]


class Hostile:
  """Something that, unpickled, makes a directory called `ran`."""

  def __reduce__(self):
    return os.mkdir, ("ran",)


def changed(**fields):
  """Returns a function that writes the kept arrays with some of them replaced."""
  return lambda path, arrays: np.savez(path, **arrays | {name: change(arrays[name]) for name, change in fields.items()})


def a_pipe(path, arrays):
  os.unlink(path)
  os.mkfifo(path)


def a_huge_header(path, arrays):
  """An array that claims 2^60 numbers, in a file of a few hundred bytes."""
  changed()(path, arrays)
  with zipfile.ZipFile(path) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  claim = b"(1152921504606846976,), }"
  members["lengths.npy"] = members["lengths.npy"].replace(b"(6,), }".ljust(len(claim)), claim)
  assert claim in members["lengths.npy"]
  with zipfile.ZipFile(path, "w") as archive:
    for name, data in members.items():
      archive.writestr(name, data)


MALFORMED = {
  "no file of ours": lambda path, arrays: path.write_bytes(b"PK\x03\x04 nothing"),
  "empty": lambda path, arrays: path.write_bytes(b""),
  "a pickle": lambda path, arrays: path.write_bytes(pickle.dumps(Hostile())),
  "an array of objects": changed(lengths=lambda lengths: np.array([Hostile()] * 6, object)),
  "a pipe": a_pipe,
  "compressed": lambda path, arrays: np.savez_compressed(path, **arrays),
  "a huge header": a_huge_header,
  "floats": changed(lengths=lambda lengths: lengths.astype(float)),
  "two axes": changed(lengths=lambda lengths: lengths[None]),
  "negative": changed(lengths=lambda lengths: -lengths),
  "too long": changed(lengths=lambda lengths: lengths + 2**61),
  "other lengths": changed(lengths=lambda lengths: lengths[::-1].copy()),
  "too few": changed(lengths=lambda lengths: lengths[:-1]),
  "other counts": changed(counts=lambda counts: counts + np.array([1, -1])),
  "negative counts": changed(counts=lambda counts: np.array([-1, 7])),
  "counts of three": changed(counts=lambda counts: np.array([2, 2, 2])),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_index_is_built_again_with_a_line(files, tmp_path, monkeypatch, kind):
  monkeypatch.chdir(tmp_path)
  lines = []
  load = lambda: load_index(files, cache_dir=str(tmp_path / "cache"), progress=lines.append)
  index = load()
  (path,) = (tmp_path / "cache").iterdir()
  with np.load(path) as kept:
    arrays = dict(kept)
  load()
  assert len(lines) == 1  # the first time
  MALFORMED[kind](path, arrays)
  again = load()
  np.testing.assert_array_equal(again.offset, index.offset)
  np.testing.assert_array_equal(again.length, index.length)
  assert len(lines) == 2 and "cannot be read" in lines[1] and not (tmp_path / "ran").exists()
  load()
  assert len(lines) == 2  # the new one is whole


def test_a_shard_that_is_a_pipe_is_an_error(files, tmp_path):
  os.unlink(files[1])
  os.mkfifo(files[1])
  with pytest.raises(DataError, match=f"shard {files[1]} cannot be read: it is no regular file"):
    load_index(files, cache_dir=str(tmp_path / "cache"), progress=print)
