"""Parses and serializes tf.Examples without a protobuf library, so that bytes are copied only once.

Example.features = 1; Features.feature = 1, a map of key = 1 and value = 2; Feature: bytes_list = 1, float_list = 2,
int64_list = 3; the lists: value = 1. A field starts with its number << 3 | kind; kind 2 is a length and bytes, 0 a varint.
https://protobuf.dev/programming-guides/encoding/
"""

import functools
import itertools
from collections.abc import Iterator

_NO_EXAMPLE = "its bytes are no tf.Example"


def parse_example(payload: bytes, keys: tuple[str, ...]) -> dict[str, bytes | int]:
  """Returns the features `keys` of a serialized tf.Example; each has exactly one value, bytes or an integer.

  Other features are skipped. Raises ValueError when a feature is missing, holds floats or not exactly one value, or the
  bytes are no tf.Example.
  """
  names, features = _keys_by_bytes(keys), {}
  try:
    for tag, start, end in _fields(payload, 0, len(payload)):
      if tag != 0o12:
        continue
      for entry_tag, entry, entry_end in _fields(payload, start, end):
        if entry_tag != 0o12:
          continue
        key, (value_start, value_end) = None, (0, 0)
        for part_tag, part, part_end in _fields(payload, entry, entry_end):
          if part_tag == 0o12:
            key = names.get(payload[part:part_end])
          elif part_tag == 0o22:
            value_start, value_end = part, part_end
        if key is not None:
          features[key] = _value(payload, value_start, value_end, key)
  except IndexError:
    raise ValueError(f"{_NO_EXAMPLE}: they end too early") from None
  if len(features) < len(names):
    raise ValueError(f"it has no feature {next(key for key in keys if key not in features)!r}")
  return features


@functools.cache
def _keys_by_bytes(keys: tuple[str, ...]) -> dict[bytes, str]:
  """Returns the keys by their UTF-8 bytes, as payloads have them."""
  return {key.encode(): key for key in keys}


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
  """Reads the number at `at`, seven bits a byte, lowest first: (the number, the position after it)."""
  value = data[at]
  if value < 128:
    return value, at + 1
  value, shift = value & 127, 7
  while shift < 70:
    at += 1
    byte = data[at]
    value |= (byte & 127) << shift
    if byte < 128:
      return value & 0xFFFFFFFFFFFFFFFF, at + 1
    shift += 7
  raise ValueError(f"{_NO_EXAMPLE}: a number has more than ten bytes")


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
  """Yields (tag, start, end) of each field of the message in data[at:end], and (tag, value, end) of a varint."""
  while at < end:
    tag = data[at]  # nearly always a single byte; calling _read_varint for each would double the time
    at += 1
    if tag > 127:
      tag, at = _read_varint(data, at - 1)
    kind = tag & 7
    if kind == 2:
      size = data[at]
      start = at + 1
      if size > 127:
        size, start = _read_varint(data, at)
      at = start + size
    elif kind == 0:
      start, at = _read_varint(data, at)
    elif kind in (1, 5):
      start = at
      at += 8 if kind == 1 else 4
    else:
      raise ValueError(f"{_NO_EXAMPLE}: a field of kind {kind}")
    if at > end or tag < 8:
      raise ValueError(f"{_NO_EXAMPLE}: {'a field goes beyond its message' if at > end else 'a field of number 0'}")
    yield tag, start, at


def _value(data: bytes, at: int, end: int, key: str) -> bytes | int:
  """Returns the only value of the Feature in data[at:end]; key: its name, for messages."""
  values = [*itertools.islice(_values(data, at, end, key), 2)]  # a hostile record may hold millions
  if len(values) != 1:
    raise ValueError(f"its feature {key!r} holds {'more than one value' if values else 'no value'}, not one")
  value = values[0]
  return value - 2**64 if isinstance(value, int) and value >= 2**63 else value


def _values(data: bytes, at: int, end: int, key: str) -> Iterator[bytes | int]:
  """Yields the values of the Feature in data[at:end], bytes or unsigned numbers."""
  for kind, start, stop in _fields(data, at, end):
    if kind == 0o12:
      yield from (data[a:b] for tag, a, b in _fields(data, start, stop) if tag == 0o12)
    elif kind == 0o32:
      for tag, a, b in _fields(data, start, stop):
        if tag == 0o10:
          yield a
        elif tag == 0o12:
          while a < b:
            number, a = _read_varint(data, a)
            yield number
    elif kind == 0o22:
      raise ValueError(f"its feature {key!r} holds floats, not bytes or integers")


def serialize_example(features: dict[str, bytes | int]) -> bytes:
  """Serializes a tf.Example with one value for each feature, laid out as the module's docstring says."""
  entries = b""
  for key, value in features.items():
    kind, values = (1, _encode_field(1, value)) if isinstance(value, bytes) else (3, _encode_field(1, _encode_varint(value)))
    entries += _encode_field(1, _encode_field(1, key.encode()) + _encode_field(2, _encode_field(kind, values)))
  return _encode_field(1, entries)


def _encode_field(number: int, content: bytes) -> bytes:
  return _encode_varint(number << 3 | 2) + _encode_varint(len(content)) + content


def _encode_varint(value: int) -> bytes:
  data = bytearray()
  while value > 127:
    data.append(value & 127 | 128)
    value >>= 7
  return bytes([*data, value])
