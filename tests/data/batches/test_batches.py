"""Batches are a function of (seed, step) alone; evaluation sees every image once; corrupt records are counted; nothing hangs."""

import dataclasses
import hashlib
import io
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from nfnets.config import DataConfig
from nfnets.data.batches import order
from nfnets.data.batches.evaluation import EvalBatches
from nfnets.data.batches.prefetch import prefetch
from nfnets.data.batches.training import TrainBatches
from nfnets.data.errors import DataError
from nfnets.data.sources.base import Record, Source
from nfnets.data.sources.open import open_source

DIGITS = DataConfig(name="digits", shift=2, flip=True)
FULL = DataConfig(
  train_crop="inception",
  image_size=24,
  flip=True,
  mix="mixup_cutmix",
  augment="randaugment",
  randaugment_layers=2,
  randaugment_magnitude=5,
  test_crop="squash",
  test_image_size=32,
)


class Photos(Source):
  """50 JPEGs of noise in various sizes; `broken` ones are cut off, the label of a record is its number."""

  def __init__(self, broken=(), n=50):
    super().__init__("photos", "train", [str(i) for i in range(n)])
    self.hints = []
    rng = np.random.default_rng(0)
    self.files = []
    for i in range(n):
      out = io.BytesIO()
      size = rng.integers(30, 60, 2)
      Image.fromarray(rng.integers(0, 256, (*(size // 8), 3), np.uint8)).resize(tuple(size)).save(out, "JPEG")
      self.files.append(out.getvalue()[:200] if i in broken else out.getvalue())

  def __len__(self):
    return len(self.files)

  def __getitem__(self, index):
    return Record(self.files[index], index)

  def address(self, index):
    return f"photos, record {index}"

  def content(self):
    return self.files

  def prefetch(self, indices):
    self.hints.append(indices)


@pytest.fixture(scope="module")
def digits():
  return open_source(DataConfig(name="digits"), "train")


@pytest.fixture(scope="module")
def photos():
  return Photos()


@pytest.fixture
def batches():
  """Makes TrainBatches that are closed after the test."""
  made = []

  def make(source, config=DIGITS, *, batch=100, seed=0, **options):
    made.append(TrainBatches(source, config, batch=batch, seed=seed, **options))
    return made[-1]

  yield make
  for training in made:
    training.close()


def digest(*parts: dict[str, np.ndarray]) -> str:
  whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  return hashlib.sha256(b"".join(whole[name].tobytes() for name in sorted(whole))).hexdigest()


def test_any_step_in_any_order_gives_the_same_batch(digits, batches):
  forwards, backwards = batches(digits), batches(digits)
  in_order = [digest(forwards[step]) for step in range(40)]
  assert [digest(backwards[step]) for step in reversed(range(40))] == in_order[::-1]
  assert len(set(in_order)) == 40
  assert digest(batches(digits, seed=4)[0]) != in_order[0]


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"mix": "none"},
    {"mix": "mixup"},
    {"mix": "cutmix", "mix_with": "second"},
    {"augment_before_mix": True},
    {"repeats": 2},
    {"augment": "autoaugment", "mix_with": "second", "augment_before_mix": True},
    {"shuffle_block": 4},
  ],
  ids=str,
)
def test_batches_are_equal_for_any_number_of_processes_and_threads(photos, batches, changes):
  """Through two edges of epochs: 50 images, batches of 24; 8 processes own 3 rows each and so cut through pairs."""
  config = dataclasses.replace(FULL, **changes)
  wanted = [digest(batches(photos, config, batch=24)[step]) for step in range(5)]
  for processes in (2, 4, 8):
    shards = [batches(photos, dataclasses.replace(config, threads=1), batch=24, process=(i, processes)) for i in range(processes)]
    assert [digest(*(shard[step] for shard in shards)) for step in range(5)] == wanted
  for threads in (2, 8):
    many = batches(photos, dataclasses.replace(config, threads=threads), batch=24)
    assert [digest(part) for part in prefetch(many.start, 0, 5)] == wanted


def test_resuming_at_any_of_20_steps_gives_the_same_batches(photos, batches):
  whole = [digest(part) for part in prefetch(batches(photos, FULL, batch=16).start, 0, 40)]
  for start in np.random.default_rng(0).choice(38, 20, replace=False):
    resumed = batches(photos, FULL, batch=16)
    assert [digest(part) for part in prefetch(resumed.start, int(start), int(start) + 2)] == whole[start : start + 2]


def test_each_epoch_holds_every_image_once_without_a_gap(photos, batches):
  made = batches(photos, dataclasses.replace(FULL, mix="none", augment="none"), batch=16)
  stream = np.concatenate([made[step]["label"] for step in range(10)])
  epochs = [stream[i * 50 : (i + 1) * 50] for i in range(3)]
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(50))
  assert not np.array_equal(epochs[0], epochs[1])


def test_blocks_keep_neighbours_near_and_lose_none():
  for n in (1, 31, 1000, 4097):
    shuffled = order.Order(n, 3, block=32)[0]
    np.testing.assert_array_equal(np.sort(shuffled), np.arange(n))
  window = shuffled[:512]  # 16 blocks of 32, one of which may be the short last one
  assert len(np.unique(window // 32)) <= 17 and not np.array_equal(window, np.sort(window))
  assert not np.array_equal(order.Order(4097, 3, block=32)[1], shuffled)


def test_augmentation_does_not_depend_on_the_batch_size(digits, batches):
  small, large = (batches(digits, batch=batch, seed=1) for batch in (50, 200))
  parts = np.concatenate([small[step]["image"] for step in range(32)])
  np.testing.assert_array_equal(parts, np.concatenate([large[step]["image"] for step in range(8)]))


def test_neighbours_are_mixed_half_by_mixup_half_by_cutmix(photos, batches):
  plain = batches(photos, dataclasses.replace(FULL, mix="none", augment="none"), batch=16)[0]
  mixed = batches(photos, dataclasses.replace(FULL, augment="none"), batch=16)[0]
  np.testing.assert_array_equal(mixed["label"], plain["label"])
  np.testing.assert_array_equal(mixed["mix_label"].reshape(-1, 2), plain["label"].reshape(-1, 2)[:, ::-1])
  own, other = plain["image"].astype(float), plain["image"].reshape(8, 2, 24, 24, 3)[:, ::-1].reshape(16, 24, 24, 3).astype(float)
  for row in range(16):
    image, ratio = mixed["image"][row], mixed["ratio"][row]
    if row // 2 % 2 == 0:
      assert np.abs(image - (ratio * own[row] + (1 - ratio) * other[row])).max() <= 1
    else:
      kept = (image == own[row]).all(axis=-1)
      assert ((image == other[row]).all(axis=-1) | kept).all()
      assert abs(kept.mean() - ratio) < 0.02


def test_a_second_batch_shows_every_image_once_more_an_epoch(photos, batches):
  made = batches(photos, dataclasses.replace(FULL, mix="mixup", mix_with="second", augment="none"), batch=50)[0]
  np.testing.assert_array_equal(np.sort(made["mix_label"]), np.arange(50))
  assert not np.array_equal(made["mix_label"], made["label"])


def test_repeats_show_an_image_several_times_and_differently(photos, batches):
  made = batches(photos, dataclasses.replace(FULL, mix="none", repeats=4), batch=32)[0]
  labels = made["label"].reshape(4, 8)
  assert (labels == labels[0]).all() and len(set(labels[0])) == 8
  assert not np.array_equal(made["image"][0], made["image"][8])


def test_corrupt_records_are_replaced_counted_and_said_once(batches):
  said = []
  broken = Photos(broken=(3, 17))
  made = batches(broken, dataclasses.replace(FULL, mix="none", max_corrupt=0.05), batch=10, say=said.append)
  labels = np.concatenate([made[step]["label"] for step in range(10)])
  assert set(labels) == set(range(50)) - {3, 17} and (labels == 4).sum() == 4
  assert set(made.corrupt) == {3, 17} and len(said) == 2 and "photos, record" in said[0]
  strict = batches(broken, dataclasses.replace(FULL, mix="none", max_corrupt=0.02), batch=10, say=said.append)
  with pytest.raises(DataError, match=r"2 of the 50 records of photos are corrupt, more than config.data.max_corrupt=0.02"):
    for step in range(10):
      strict[step]


@pytest.mark.parametrize("batch, processes", [(1, 1), (7, 1), (50, 1), (64, 1), (24, 4)])
def test_evaluation_counts_every_image_once(photos, batch, processes):
  parts = []
  for process in range(processes):
    made = EvalBatches(photos, FULL, batch=batch, process=(process, processes))
    parts.append(list(made))
    made.close()
  seen = np.concatenate([part["label"][part["mask"]] for step in zip(*parts, strict=True) for part in step])
  np.testing.assert_array_equal(seen, np.arange(50))
  assert {part["image"].shape for step in parts for part in step} == {(batch // processes, 32, 32, 3)}


def test_evaluation_leaves_out_what_is_corrupt(photos):
  said = []
  made = EvalBatches(Photos(broken=(5,)), dataclasses.replace(FULL, max_corrupt=0.02), batch=16, say=said.append)
  assert sum(part["mask"].sum() for part in made) == 49 and len(said) == 1
  made.close()


def test_a_bucket_is_told_what_comes_next_in_order(batches):
  remote = Photos(n=300)
  remote.remote = True
  made = batches(remote, dataclasses.replace(FULL, shuffle_block=2), batch=8, process=(1, 2))
  read = np.concatenate([part["label"] for part in prefetch(made.start, 5, 30)])
  hinted = np.concatenate(remote.hints)
  np.testing.assert_array_equal(hinted[: len(read)], read)  # from the step of the resume on, each once, none left out
  assert min(map(len, remote.hints[1:])) >= 16  # enough at once for neighbours to be read together


@pytest.mark.parametrize(
  "changes, options, message",
  [
    ({}, {"batch": 7}, "config.batch=7 is odd"),
    ({"repeats": 3}, {}, "repeats=3 times"),
    ({"mix": "none"}, {"process": (0, 3)}, "3 processes"),
    ({"randaugment_layers": None}, {}, "randaugment_layers"),
    ({"train_crop": "none", "image_size": None}, {}, "are not square"),
  ],
)
def test_what_cannot_be_is_refused_in_words(photos, batches, changes, options, message):
  with pytest.raises(DataError, match=message):
    batches(photos, dataclasses.replace(FULL, **changes), **{"batch": 16, **options})[0]


def test_prefetch_keeps_order_raises_where_it_broke_and_leaves_no_thread(photos):
  def broken_at_three(step):
    if step == 3:
      raise OSError("disk gone")
    return made.start(step)

  before = threading.active_count()
  made = TrainBatches(photos, FULL, batch=4, seed=0)
  assert [part["image"].shape[0] for part in prefetch(made.start, 5, 9)] == [4] * 4
  seen = []
  with pytest.raises(OSError, match="disk gone"):
    for value in prefetch(broken_at_three, 0, 10):
      seen.append(value)
  assert len(seen) == 3
  early = prefetch(made.start, 0, 10**9)
  next(early)
  early.close()
  made.close()
  assert threading.active_count() == before


REAL = """
import dataclasses, sys
import numpy as np
from nfnets.data.batches.training import TrainBatches
from nfnets.data.sources.open import open_source
from tests.data.batches.test_batches import FULL
index, count, threads, out = *map(int, sys.argv[1:4]), sys.argv[4]
config = dataclasses.replace(FULL, name="digits", threads=threads)
batches = TrainBatches(open_source(config, config.train_split), config, batch=106, seed=3, process=(index, count))
parts = [batches[step] for step in range(12, 16)]  # the second epoch begins within 13
batches.close()
np.savez(out, **{f"{step}/{name}": value for step, part in enumerate(parts) for name, value in part.items()})
"""


def test_real_processes_make_the_same_global_batch(batches, tmp_path):
  """Two processes of their own, one thread and four: pairs that are mixed across the border between them included."""
  running = [
    subprocess.Popen(
      [sys.executable, "-c", REAL, str(index), "2", threads, str(tmp_path / f"{index}.npz")],
      cwd=pathlib.Path(__file__).parents[3],
    )
    for index, threads in ((0, "1"), (1, "4"))
  ]
  assert [process.wait(120) for process in running] == [0, 0]
  halves = [np.load(tmp_path / f"{index}.npz") for index in (0, 1)]
  config = dataclasses.replace(FULL, name="digits")
  whole = batches(open_source(config, config.train_split), config, batch=106, seed=3)
  for step in range(4):
    for name, expected in whole[12 + step].items():
      np.testing.assert_array_equal(np.concatenate([half[f"{step}/{name}"] for half in halves]), expected)
