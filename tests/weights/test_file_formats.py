"""Files that are no weights, or larger inside than outside, are one line; what they are, their first bytes say."""

import io
import json
import os
import struct
import zipfile

import numpy as np
import pytest

from nfnets.weights import formats
from nfnets.weights.errors import WeightsError


def npy(shape, dtype="<f4", data=b"", version=(1, 0)) -> bytes:
  header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
  return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(header)) + header + data


def zipped(members: dict[str, bytes], method=zipfile.ZIP_STORED) -> bytes:
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", method) as archive:
    for name, content in members.items():
      archive.writestr(name, content)
  return file.getvalue()


def safetensors(header: dict, data: bytes = b"") -> bytes:
  text = json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text + data


GOOD = zipped({"a.npy": npy((2,), data=b"\0" * 8)})
TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BAD = {
  "empty": (b"", "is empty"),
  "web page": (b"<!DOCTYPE html><html>Not found</html>", "is a web page"),
  "web page after lines": (b"\n\n  <html>", "is a web page"),
  "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
  "text": (b"hello" * 20, "is no file of weights"),
  "noise": (bytes(range(1, 128)), "is no file of weights"),
  "a zip bomb": (zipped({"a.npy": npy((1 << 26,), "u1", bytes(1 << 26))}, zipfile.ZIP_DEFLATED), "would unpack to"),
  "a header that asks for terabytes": (zipped({"a.npy": npy((10**12,), data=b"abcd")}), "says that it is"),
  "a header that asks for nothing": (zipped({"a.npy": npy((0, 10**12))}), "says that it is"),
  "negative sides": (zipped({"a.npy": npy((-1, -1), data=b"abcd")}), "says that it is|damaged"),
  "objects": (zipped({"a.npy": npy((1,), "|O", b"\x80\x04N.")}), "expected numbers"),
  "records": (zipped({"a.npy": npy((1,), [("x", "<f4")], b"abcd")}), "expected numbers"),
  "npy of another version": (zipped({"a.npy": npy((1,), version=(9, 9))}), "expected 1.0 or 2.0|damaged"),
  "no npy": (zipped({"a.npy": b"abcdefghijkl"}), "damaged"),
  "code as a header": (zipped({"a.npy": b"\x93NUMPY\x01\x00\x12\x00__import__('os').x"}), "damaged"),
  "another member": (zipped({"a.py": b"import os"}), "expected arrays"),
  "no members": (zipped({}), "is no file of weights|holds no arrays"),
  "cut off": (GOOD[:-30], "damaged"),
  "wrong checksum": (GOOD.replace(b"\0" * 8, b"\0" * 7 + b"\1"), "damaged"),
  "safetensors cut off": (safetensors({"a": TENSOR}), "is no safetensors file"),
  "safetensors with another size": (safetensors({"a": {**TENSOR, "shape": [10**12]}}, b"abcd"), "is no safetensors file"),
  "safetensors over each other": (safetensors({"a": TENSOR, "b": TENSOR}, b"abcd"), "is no safetensors file"),
  "safetensors of nothing": (safetensors({}), "holds no arrays|is no file of weights"),
  "texts": (zipped({"a.npy": npy((1,), "<U1", b"abcd")}), "expected numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_no_weights_are_one_line(tmp_path, name):
  content, message = BAD[name]
  (tmp_path / "x.npz").write_bytes(content)
  with pytest.raises(WeightsError, match=message) as refused:
    formats.read(tmp_path / "x.npz")
  assert "\n" not in str(refused.value) and "x.npz" in str(refused.value)


def test_two_members_of_one_name_are_one_line(tmp_path):
  with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "x", "w") as archive:
    archive.writestr("a.npy", npy((1,), data=b"abcd"))
    archive.writestr("a.npy", npy((1,), data=b"abcd"))
  with pytest.raises(WeightsError, match="two members of the same name"):
    formats.read(tmp_path / "x")


def test_what_is_no_regular_file_is_one_line(tmp_path):
  os.mkfifo(tmp_path / "fifo")
  (tmp_path / "link").symlink_to(tmp_path / "nowhere")
  (tmp_path / "loop").symlink_to(tmp_path / "loop")
  for name, message in {
    "fifo": "no regular file",
    "link": "not there",
    "loop": "not there|cannot be read",
    ".": "no regular",
  }.items():
    with pytest.raises(WeightsError, match=message):
      formats.read(tmp_path / name)


def test_npz_of_either_order_come_back_through_a_link(tmp_path):
  arrays = {
    "a": np.arange(6.0).reshape(2, 3),
    "b/c": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "d": np.arange(3, dtype=">f4"),
  }
  np.savez(tmp_path / "x.npz", **arrays)
  (tmp_path / "link").symlink_to(tmp_path / "x.npz")
  read = formats.read(tmp_path / "link")
  assert read.format == "npz"
  for name, array in arrays.items():
    assert read.arrays[name].dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(read.arrays[name], array)
