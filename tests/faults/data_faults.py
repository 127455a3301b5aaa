"""Damages data as storage can: flips bits in the payloads of TFRecord shards.

Each function needs an empty directory and returns what it counted; "silent" must be 0.
"""

import dataclasses
import pathlib
import random

from nfnets.config import DataConfig
from nfnets.data.errors import CorruptRecord
from nfnets.data.sources.open import open_source
from nfnets.data.storage import tfrecord
from tests import shards


@dataclasses.dataclass(frozen=True)
class Flips:
  """What came of flipped bits.

  Attributes:
    attempts: bits flipped, one at a time.
    named: how many of them led to a CorruptRecord with the record's address.
    silent: how many of them were not noticed, so that the record was read.
  """

  attempts: int
  named: int
  silent: int


def flip_payload_bits(directory: pathlib.Path, flips: int = 200, seed: int = 0) -> Flips:
  """Flips single bits of payloads, one at a time, every tenth in a label, and reads them with the source that training uses."""
  version = shards.write_dataset(directory, {"train": [20, 20]})
  files = sorted(version.glob("*.tfrecord-*"))
  source = open_source(DataConfig(name="pictures", dir=str(directory), index_dir=str(directory / "index")), "train")
  rng, named, silent = random.Random(seed), 0, 0
  for attempt in range(flips):
    index = rng.randrange(len(source))
    file = files[index // 20]
    whole = file.read_bytes()
    payload = shards.example(file_name=b"x", image=shards.image_of("train", index), label=index % 5)
    start = whole.index(shards.framed(payload)) + tfrecord.HEADER
    if attempt % 10 == 0:  # the byte of the label is the last one
      assert payload[-1] == index % 5
      at = start + len(payload) - 1
    else:
      at = start + rng.randrange(len(payload))
    damaged = bytearray(whole)
    damaged[at] ^= 1 << rng.randrange(8)
    file.write_bytes(damaged)
    try:
      source[index]
      silent += 1
    except CorruptRecord as error:
      named += error.address == source.address(index)
    file.write_bytes(whole)
    assert source[index].label == index % 5, "the damage was not undone"
  source.close()
  return Flips(flips, named, silent)
