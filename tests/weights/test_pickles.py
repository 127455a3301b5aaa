"""Pickles of arrays are read by a machine of our own: arrays come back, whatever else is refused, and nothing is run."""

import collections
import os
import pickle
import pickletools
import struct
import time
import tracemalloc

import numpy as np
import pytest

from nfnets.weights import pickles
from nfnets.weights.errors import WeightsError

TREE = {
  "NFNet/~/stem_conv0": {"w": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "gain": np.ones(4, np.float16)},
  "NFNet/~/nf_block": {"skip_gain": np.float32(0.5).reshape(())},
  "others": {
    "scalar": np.float32(3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big_endian": np.arange(4, dtype=">f4"),
    "counter": np.int32(7),
    "bytes_above_127": np.full(5, -np.pi, np.float64),
  },
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_trees_of_arrays_come_back(protocol):
  read = pickles.read(pickle.dumps(TREE, protocol), "a file")
  assert {module: set(leaves) for module, leaves in read.items()} == {module: set(leaves) for module, leaves in TREE.items()}
  for module, leaves in TREE.items():
    for name, array in leaves.items():
      assert read[module][name].dtype == np.asarray(array).dtype.newbyteorder("=")
      np.testing.assert_array_equal(read[module][name], array)


class Call:
  """Pickles as the call of a function."""

  def __init__(self, function, *arguments):
    self.call = (function, arguments)

  def __reduce__(self):
    return self.call


class Rebuilt(np.ndarray):
  """An array of a class that a reader would have to import."""


def short(text: str) -> bytes:
  return b"\x8c" + struct.pack("<B", len(text)) + text.encode()


DTYPE = b"cnumpy\ndtype\n" + short("f4") + b"\x89\x88\x87R"
ARRAY = b"cnumpy._core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R"


def state(shape: bytes, data: bytes) -> bytes:
  return b"\x80\x04}" + short("a") + ARRAY + b"(K\x01" + shape + DTYPE + b"\x89" + data + b"tbs."


def nested(levels: int) -> bytes:
  """Dictionaries in which each level has the one before it twenty times: a few hundred bytes that say 20^levels arrays."""
  code = b"\x80\x04" + ARRAY + b"(K\x01K\x01\x85" + DTYPE + b"\x89C\x04abcdtbq\x00"
  for level in range(levels):
    code += b"0}(" + b"".join(short(str(i)) + b"h" + bytes([level]) for i in range(20)) + b"uq" + bytes([level + 1])
  return code + b"."


def hostile(folder) -> dict[str, bytes]:
  touch = f"touch {folder}/run"
  dumped = lambda value, protocol=4: pickle.dumps({"NFNet": {"w": value}}, protocol)
  encode = b"c_codecs\nencode\nq\x02" + b"X" + struct.pack("<I", 10_000) + b"x" * 10_000 + short("latin1") + b"\x86q\x03"
  return {
    "os.system": dumped(Call(os.system, touch)),
    "os.system, protocol 2": dumped(Call(os.system, touch), 2),
    "eval": dumped(Call(eval, f"open('{folder}/run', 'w')")),
    "exec": dumped(Call(exec, f"open('{folder}/run', 'w')")),
    "import": dumped(Call(__import__, "this")),
    "a function alone": dumped(os.system),
    "numpy.load": dumped(Call(np.load, f"{folder}/run")),
    "numpy.memmap": dumped(Call(np.memmap, f"{folder}/run", "u1", "w+", 0, (1,))),
    "object array": dumped(np.array([Call(os.system, touch)], object)),
    "subclass": dumped(np.zeros(3).view(Rebuilt)),
    "list": dumped([1, 2]),
    "OrderedDict of code": pickle.dumps(collections.OrderedDict(a=Call(os.system, touch))),
    "protocol 0": dumped(np.zeros(3), 0),
    "instance": b"\x80\x02(ios\nsystem\n.",
    "object": b"\x80\x02(cos\nsystem\no.",
    "newobj": b"\x80\x02cos\nsystem\n)\x81.",
    "persistent id": b"\x80\x02Ps3://x\n.",
    "extension": b"\x80\x02\x82\x01.",
    "dotted name": b"\x80\x04" + short("numpy") + short("ndarray.tofile") + b"\x93.",
    "a text in an array's place": b"\x80\x04}" + short("a") + short("b") + b"s.",
    "an array called": b"\x80\x04" + ARRAY + b")R.",
    "state of a dictionary": b"\x80\x04})b.",
    "a billion numbers": state(b"J\xff\xff\xff\x7f\x85", b"C\x04abcd"),
    "negative sides": state(b"J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86", b"C\x04abcd"),
    "no numbers": state(b"K\x00\x85", b"C\x00"),
    "many sides": state(b"(" + b"K\x01" * 50 + b"t", b"C\x04abcd"),
    "bytes that are not there": b"\x80\x04\x8e" + struct.pack("<Q", 10**11) + b"x.",
    "text that is not there": b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"x.",
    "a whole number of a gigabyte": b"\x80\x04\x8b\x00\x00\x00\x40.",
    "no dtype of numbers": b"\x80\x04cnumpy\ndtype\n" + short("V999999999") + b"\x89\x88\x87R.",
    "the same bytes a thousand times": b"\x80\x02" + encode + b"R0" + b"h\x02h\x03R0" * 1000 + b"}.",
    "nested twenty to the fourth": nested(4),
    "nested in itself": b"\x80\x04}q\x00" + short("a") + b"h\x00s.",
    "one array in a hundred thousand places": b"\x80\x04"
    + ARRAY
    + b"(K\x01M\xe8\x03\x85"
    + DTYPE
    + b"\x89B\xa0\x0f\x00\x00"
    + b"x" * 4000
    + b"tbq\x00}("
    + b"".join(short(str(i)) + b"h\x00" for i in range(20_000))
    + b"u.",
    "twice the same key": b"\x80\x04}(" + short("a") + ARRAY + short("a") + ARRAY + b"u.",
    "two million marks": b"\x80\x04" + b"(" * 2_000_000,
    "endless": b"\x80\x04" + b"N0" * 1_000_000 + b".",
    "a deep tuple": b"\x80\x04)" + b"\x85" * 100_000 + b".",
    "a key that is a deep tuple": b"\x80\x04})" + b"\x85" * 100_000 + b"Ns.",
    "nothing on the stack": b"\x80\x04R.",
    "no mark": b"\x80\x04}u.",
    "an empty memo": b"\x80\x04h\x05.",
    "no end": b"\x80\x04}",
    "empty": b"",
  }


NAMES = list(hostile("x"))


@pytest.mark.parametrize("name", NAMES)
def test_hostile_pickles_are_one_line_and_nothing_is_run(tmp_path, name):
  data = hostile(tmp_path)[name]
  tracemalloc.start()
  began = time.process_time()
  try:
    with pytest.raises(WeightsError, match="a file is refused as a pickle of weights, of which nothing was run: ") as refused:
      pickles.read(data, "a file")
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
  assert list(tmp_path.iterdir()) == []
  assert peak < 1 << 24 + (len(data) > 1 << 20) * 4
  assert time.process_time() - began < 30


def test_every_place_of_damage_is_one_line():
  """Cut off or changed at any byte, a pickle gives arrays or one line, never another error."""
  data = pickle.dumps(TREE, 4)
  random, refused = np.random.default_rng(0), 0
  for at in range(len(data)):
    for changed in (data[:at], data[:at] + bytes([random.integers(256)]) + data[at + 1 :]):
      try:
        assert isinstance(pickles.read(changed, "a file"), dict)
      except WeightsError as error:
        assert "\n" not in str(error)
        refused += 1
  assert refused > len(data)  # all that are cut off, and most of the others


def test_the_instructions_that_are_known_are_those_of_pickletools():
  known = {ord(opcode.code) for opcode in pickletools.opcodes}
  assert set(pickles._ACTIONS) < known
