"""The network that a person names: how it is called, which of its layers come first, and how it is trained."""

import math
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets import models
from nfnets.agc import named_leaves
from nfnets.config import DataConfig
from nfnets.errors import UserError
from nfnets.lab import task, training, users
from nfnets.lab.experiment import Settings
from nfnets.lab.experiments import agc_inside, backward, stability_edge
from nfnets.lab.progress import Progress
from nfnets.lab.training import Recipe
from nfnets.lab.zoo import ZooTrainer

NETWORK = """
  from flax import nnx

  class Net(nnx.Module):
    image_size = 16

    def __init__(self, seed):
      rngs = nnx.Rngs(seed)
      self.zeroth = nnx.Linear(64, 8, rngs=rngs)
      self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])
      self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
      self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, images):
      assert images.shape[1:] == (16, 16, 3)
      x = self.zeroth(images[:, ::2, ::2, 0].reshape(-1, 64))
      for block in self.blocks:
        x = nnx.relu(block(x))
      return self.head(self.norm(x))

  def make(seed):
    return Net(seed)
"""


@pytest.fixture
def network(tmp_path):
  """Writes a person's file, for a number of classes, and returns what --model says."""

  def write(classes: int = 10) -> str:
    (tmp_path / "mine.py").write_text(textwrap.dedent(NETWORK).replace("CLASSES", str(classes)))
    return f"{tmp_path / 'mine.py'}:make"

  return write


def test_it_gets_images_of_its_size_and_normalizes_as_it_is_told(network):
  images = task.images(count=12)[0]
  for name in (network(), "resnet_tiny"):
    made = users.UserNetwork(name, 0, 10)
    if name == "resnet_tiny":
      users.open_branches(made.network, 0)  # whose classifier begins with 0
    trains, evaluates = (made(images, train=train) for train in (True, False))
    assert trains.shape == evaluates.shape == (12, 10)
    assert not np.allclose(trains, evaluates, atol=1e-3)  # statistics of these images, and running ones
  assert users.UserNetwork("nf_resnet_tiny", 0, 7)(images, key=jax.random.key(0)).shape == (12, 7)


def test_layers_are_numbered_in_the_order_in_which_images_pass_them(network):
  data, recipe = task.data(None, cut=False), Recipe(batch=8, steps=2)
  numbers = users.UserTrainer(network(), data, recipe).layer_numbers()["network"]
  first = lambda tree: set(jax.tree.leaves(tree))
  order = [numbers["zeroth"], *(numbers["blocks"][i] for i in range(3)), numbers["norm"], numbers["head"]]
  assert [first(part) for part in order] == [{i} for i in range(6)]
  numbers = users.UserTrainer("nfnet_digits", data, recipe).layer_numbers()["network"]
  order = [numbers["stem"], *(numbers["blocks"][i] for i in range(4)), numbers["final_conv"], numbers["fc"]]
  assert [first(part) for part in order] == [{i} for i in range(7)]


def test_it_learns_with_clipping_that_leaves_its_classifier_alone(network):
  data = task.data(None, cut=False)
  trainer = users.UserTrainer(network(), data, Recipe(batch=64, steps=60))
  start = trainer.init(3)
  after, losses, _ = trainer.train(start, training.batches(len(data.train[1]), trainer.recipe, 0), 0.5)
  assert losses[-5:].mean() < losses[:5].mean() - 0.5
  grads = jax.tree.map(jnp.ones_like, start)
  clipped, _ = (clip := training.clip(jnp.float32(1e-6), start)).update(grads, clip.init(start), start)
  assert jnp.all(clipped["network"]["head"]["kernel"] == 1) and jnp.all(clipped["network"]["zeroth"]["kernel"] < 1e-3)


def test_with_running_statistics_it_learns_too(network):
  trainer = users.UserZooTrainer(network(), task.data(None, cut=False), Recipe(batch=64, steps=60), 0.5)
  before, after = trainer.init(0), trainer.fit(0)
  mean = lambda state: np.asarray(state["network"]["norm"]["mean"][...])
  assert np.abs(mean(after) - mean(before)).max() > 0.01
  assert trainer.accuracy(after) > 0.5


def test_a_network_of_the_zoo_is_opened_at_initialization_alone():
  """With gains of 0, as it is trained, blocks add nothing; opened ones do."""
  gains = lambda network: [float(block.skip_gain[...]) for block in network.blocks]
  trained, shown = (users.user_model("nf_resnet_tiny", seed=0, opened=opened)[0] for opened in (False, True))
  assert set(gains(trained)) == {0.0} == set(gains(users.UserNetwork("nf_resnet_tiny", 0, 10).network))
  assert set(gains(shown)) == {1.0}
  assert len(users.note("nf_resnet_tiny")) == 1 and users.note(None) == users.note("mine.py:make") == ()


def test_the_twin_is_clipped():
  """With a tiny λ only the classifier's weight moves; with none all do."""
  data, recipe = task.data(None, cut=False), Recipe(batch=16, steps=12, warmup=2)
  make = lambda key: models.create("nf_resnet_tiny", 10, rngs=key, depth=(1, 1, 1), width=(8, 8, 8))
  for strength, held in ((1e-9, True), (math.inf, False)):
    trainer = ZooTrainer(make, data, recipe, 0.5, strength)
    before, after = trainer.init(0), trainer.fit(0)
    moved = {
      path: float(jnp.abs(a - b).max()) for (path, a, _), (_, b, _) in zip(*map(named_leaves, (after, before)), strict=True)
    }
    others = max(far for path, far in moved.items() if path.endswith("kernel") and not path.startswith("fc"))
    assert moved["fc/kernel"] > 1e-3 and (others < 1e-6) == held


def test_too_few_classes_are_told(network):
  data, recipe = task.data(None, cut=False), Recipe(batch=8, steps=10)
  for trainer in (users.UserTrainer(network(4), data, recipe), users.UserZooTrainer(network(4), data, recipe, 0.1)):
    with pytest.raises(UserError, match="at least 10 classes, got 4"):
      trainer.logits(trainer.init(0), data.train[0][:2], *[True] * isinstance(trainer, users.UserZooTrainer))


@pytest.mark.parametrize("experiment", [agc_inside, backward, stability_edge])
def test_experiments_tell_too_few_classes_before_they_measure(network, experiment):
  measured = Progress(lambda line: pytest.fail("measured first"))
  with pytest.raises(UserError, match="at least 10 classes, got 4"):
    experiment.run(Settings(model=network(4)), measured)


def test_its_operations_are_three_times_those_of_its_products(network):
  products = 2 * (64 * 8 + 3 * 8 * 8 + 8 * 10)
  assert 3 * products < users.operations(network(), 10) < 3 * 1.2 * products  # the rest: biases, ReLU, normalization


def test_patches_become_the_images_that_they_were_cut_from():
  images, cut = task.data(None, cut=False), task.whole(task.data(None))
  assert jnp.array_equal(cut.train[0], images.train[0]) and jnp.array_equal(cut.test[0], images.test[0])


def test_images_of_a_config_stand_in_for_the_digits():
  """256 images of noise, 12 classes, averaged to 16 pixels a side; read once."""
  config = DataConfig(name="synthetic", image_size=32, num_classes=12)
  images, labels = task.images(config, 20, seed=1, side=8)
  every, numbers = task.images(config, side=task.SIDE)
  assert images.shape == (20, 8, 8, 3) and every.shape == (256, 16, 16, 3)
  chosen = np.random.default_rng(1).permutation(256)[:20]
  assert jnp.array_equal(images, every[chosen][:, ::2, ::2]) and jnp.array_equal(labels, numbers[chosen])
  assert (
    task.classes(config) == 12 and task.name(config) == "synthetic" and (task.classes(None), task.name(None)) == (10, "digits")
  )
  assert jnp.array_equal(task.data(config, cut=False).train[0], every)


class Brief(Settings):
  """A few steps of tiny networks."""

  def of_scale(self, small, full):
    return 20 if isinstance(small, int) else (16, 4, 1)


def test_the_edge_of_stability_is_measured_for_it_too(network):
  name = network()
  measured = stability_edge.run(Brief(seeds=1, model=name), Progress(lambda share: None))
  assert [row["network"] for row in measured.rows].count(name) == 1 and len(measured.yours["yours"]) == 1
