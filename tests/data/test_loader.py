"""Batches are a function of (seed, step); evaluation sees every image once; nothing hangs."""
import threading

import numpy as np
import pytest

from nfnets.config import DataConfig
from nfnets.data import loader, sources

DIGITS = DataConfig(name="digits", shift=2, flip=True)


@pytest.fixture(scope="module")
def digits():
  return sources.load(DataConfig(name="digits"), train=True)


def test_any_step_in_any_order_gives_the_same_batch(digits):
  make = lambda: loader.TrainBatches(digits, DIGITS, batch=100, seed=3)
  forwards, backwards = make(), make()
  in_order = [forwards[step] for step in range(40)]
  for step in reversed(range(40)):
    for name, value in backwards[step].items():
      np.testing.assert_array_equal(value, in_order[step][name])
  assert not np.array_equal(in_order[0]["label"], loader.TrainBatches(digits, DIGITS, batch=100, seed=4)[0]["label"])


def test_each_epoch_holds_every_image_once_without_a_gap(digits):
  data = sources.Images(images=digits.images, labels=np.arange(len(digits), dtype=np.int32), class_names=digits.class_names)
  batches = loader.TrainBatches(data, DataConfig(), batch=100, seed=0)
  stream = np.concatenate([batches[step]["label"] for step in range(3 * len(data) // 100 + 1)])
  epochs = [stream[i * len(data):(i + 1) * len(data)] for i in range(3)]
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(len(data)))
  assert not np.array_equal(epochs[0], epochs[1])


def test_augmentation_does_not_depend_on_the_batch_size(digits):
  small, large = (loader.TrainBatches(digits, DIGITS, batch=batch, seed=1) for batch in (50, 200))
  parts = np.concatenate([small[step]["image"] for step in range(32)])
  whole = np.concatenate([large[step]["image"] for step in range(8)])
  np.testing.assert_array_equal(parts, whole)


def test_shifted_images_move_and_repeat_their_edge():
  image = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
  moved = loader.shift_images(image, np.array([[1, -2], [0, 0]]))
  np.testing.assert_array_equal(moved[1], image[1])
  np.testing.assert_array_equal(moved[0, 1:, :3], image[0, :-1, 2:])
  np.testing.assert_array_equal(moved[0, 0, :3], image[0, 0, 2:])
  np.testing.assert_array_equal(moved[0, 1:, 4], image[0, :-1, 4])


@pytest.mark.parametrize("batch", [1, 7, 360, 1000])
def test_evaluation_counts_every_image_once(batch):
  data = sources.load(DataConfig(name="digits"), train=False)
  seen = [(part["image"][part["mask"]], part["label"][part["mask"]]) for part in loader.eval_batches(data, batch)]
  np.testing.assert_array_equal(np.concatenate([images for images, _ in seen]), data.images)
  np.testing.assert_array_equal(np.concatenate([labels for _, labels in seen]), data.labels)
  assert {len(part["mask"]) for part in loader.eval_batches(data, batch)} == {batch}


def test_prefetch_keeps_order_raises_where_it_broke_and_leaves_no_thread():
  def broken_at_three(step):
    if step == 3:
      raise OSError("disk gone")
    return step
  before = threading.active_count()
  assert list(loader.prefetch(lambda step: step, 5, 9)) == [5, 6, 7, 8]
  seen = []
  with pytest.raises(OSError, match="disk gone"):
    for value in loader.prefetch(broken_at_three, 0, 10):
      seen.append(value)
  assert seen == [0, 1, 2]
  early = loader.prefetch(lambda step: step, 0, 10**9)
  assert next(early) == 0
  early.close()
  assert threading.active_count() == before


# ---------------------------------------------------------------- sources
def test_digits_are_a_fixed_stratified_split():
  train, test = (sources.load(DataConfig(name="digits"), train=which) for which in (True, False))
  assert (len(train), len(test)) == (1437, 360)
  assert train.images.shape[1:] == (8, 8, 3) and train.images.dtype == np.uint8 and train.images.max() == 255
  assert np.ptp(np.bincount(test.labels)) <= 2
  assert not {image.tobytes() for image in test.images} & {image.tobytes() for image in train.images}


@pytest.mark.parametrize("changes, message", [
    ({"name": "cifar1"}, "near: cifar10"), ({"name": "digits", "train_split": "validation"}, "'train' and 'test'"),
    ({"name": "digits", "num_classes": 11}, "digits has 10 classes"), ({"name": "digits", "image_size": 32}, "are 8×8"),
    ({"name": "cifar10", "dir": "/nowhere"}, "not a directory"), ({"name": "digits", "shift": -1}, "DataConfig.shift = -1"),
    ({"name": "digits", "std": (0.0, 1.0, 1.0)}, "DataConfig.std")])
def test_bad_data_is_refused_in_words(changes, message):
  with pytest.raises(ValueError, match=message):
    sources.load(DataConfig(**changes), train=True)


def test_a_dataset_that_is_not_prepared_says_what_to_run(tmp_path):
  with pytest.raises(sources.DataError, match="tfds build cifar10 --file_format=array_record --data_dir="):
    sources.load(DataConfig(name="cifar10", dir=str(tmp_path)), train=True)
