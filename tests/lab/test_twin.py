"""Twins without normalization: of the zoo's networks, and of a user's that is built with a kit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nfnets import lab, models
from nfnets.errors import UserError
from nfnets.lab import twin
from nfnets.models.network import block_specs
from nfnets.models.nf_resnet import NFResNet


class Net(nnx.Module):
  """A user's residual network of one transition and one further block, as the documentation of kits shows it."""

  image_size = 8

  def __init__(self, kit):
    self.stem = kit.conv(3, 8, 3)
    self.joins = nnx.List([kit.block(transition=True), kit.block()])
    self.norms = nnx.List([kit.norm(8), kit.norm(16)])
    self.convs = nnx.List([kit.conv(8, 16, 3), kit.conv(16, 16, 3)])
    self.shortcut = kit.conv(8, 16, 1)
    self.activation = kit.activation
    self.fc = kit.classifier(16, 10)

  def __call__(self, images, train=True):
    x = self.stem(images)
    for i, (join, norm, conv) in enumerate(zip(self.joins, self.norms, self.convs, strict=True)):
      out = join.enter(self.activation(norm(x, train)))
      x = join(self.shortcut(out) if i == 0 else x, conv(out))
    return self.fc(x.mean(axis=(1, 2)))


def test_betas_of_a_kit_are_those_of_the_zoo():
  """The blocks' expected deviations are theory's, as `block_specs` has them for stages of 2 and 1 blocks."""
  kit = twin.NormFreeKit(0)
  betas = [kit.block(transition=transition).beta for transition in (True, False, True)]
  specs = block_specs(depth=(2, 1), width=(4, 8), strides=(1, 2), in_features=2, alpha=0.2, stochastic_depth=0.0)
  np.testing.assert_allclose(betas, [1 / spec.expected_std for spec in specs], rtol=1e-6)


def test_a_users_network_and_its_twin():
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
  plain, free = Net(twin.BatchNormKit(0)), Net(twin.NormFreeKit(0))
  assert plain(images).shape == free(images).shape == (4, 10)
  stats = lambda network: jax.tree.leaves(nnx.state(network, nnx.BatchStat))
  assert stats(plain) and not stats(free)
  alone = jnp.concatenate([free(images[i : i + 1]) for i in range(4)])
  np.testing.assert_allclose(free(images), alone, rtol=1e-5, atol=1e-6)
  assert np.abs(np.asarray(plain(images)) - np.concatenate([plain(images[i : i + 1]) for i in range(4)])).max() > 1e-2


def test_the_zoos_twin_has_the_same_shape():
  changes = {"width": (16, 16, 32), "depth": (1, 1, 1), "activation": "silu"}
  network = lab.nf_twin("resnet_tiny", 7, rngs=0, **changes)
  assert isinstance(network, NFResNet) and network.stem.kernel.shape[0] == 3
  shape = lambda network: [
    leaf.shape
    for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(network, nnx.Param)))
    if path[-1].key == "kernel"
  ]
  assert shape(network) == shape(models.create("resnet_tiny", 7, **changes))


@pytest.mark.parametrize("name", ("nf_resnet50", "fixup_resnet50", "skipinit_resnet50"))
def test_what_has_no_batch_normalization_has_no_twin(name):
  with pytest.raises(UserError, match=f"with batch normalization, such as resnet50; got {name}"):
    lab.nf_twin(name, 7, rngs=0)
  assert not twin.has_twin(models.variant("resnet50", norm="group"))


def test_recipe_changes_name_a_threshold_for_each_batch():
  assert [twin.clipping(batch) for batch in (256, 1024, 4096, 8192)] == [0.16, 0.04, 0.01, 0.01]
  assert "0.16 at batch 256" in twin.recipe_changes()[0] and "0.01 at batch 4,096 and above" in twin.recipe_changes()[0]
