"""A folded network computes the same logits with fewer operations; convolutions take its scales in."""

import collections
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from nfnets import models
from nfnets.export import program
from nfnets.export.fold import fold
from nfnets.models import convolution
from nfnets.models.description import multiply_adds
from tests.export import networks


@functools.cache
def both(name: str, **options) -> tuple[models.Network, np.ndarray, program.Program, program.Program]:
  network, size = networks.make(name, **options)
  images = networks.images(size)
  whole = program.of_network(network, images.shape)
  return network, images, whole, fold(whole)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_the_logits_stay_and_operations_go(name):
  network, images, whole, folded = both(name)
  expected = nnx.jit(lambda network, images: network(images))(network, images)
  assert networks.difference(jax.jit(folded)(images), expected) <= 1e-5
  assert len(folded.operations()) < 0.95 * len(whole.operations())
  macs = lambda program: sum(count for _, count in multiply_adds(jax.make_jaxpr(program)(images).jaxpr))
  # The kernels of grouped convolutions are taken apart for CPUs by matrix products without sums, which do not count.
  assert macs(folded) == macs(whole)


def test_a_network_without_gates_is_convolutions_biases_activations_and_sums_alone():
  _, _, _, folded = both("nf_resnet")
  # A convolution may have a form of its own for CPUs, see convolution.convolve.
  named = lambda node: "conv_general_dilated" if program.convolution(node) else node.op
  counts = collections.Counter(map(named, folded.operations()))
  convolutions, blocks = 4 * 3 + 2 + 1, 4
  assert counts == {
    "conv_general_dilated": convolutions,
    "add": convolutions + blocks + 1,  # a bias each, the sums of the branches, and the classifier's bias
    "max": 3 * blocks + 1,
    "reduce_sum": 1,
    "dot_general": 1,
  }


def test_a_gate_takes_the_scales_of_its_branch():
  """All multiplications by a constant but those in GELU read [batch, 1, 1, channels], of which there is one a block."""
  _, _, _, folded = both("nf_seresnet")
  constant = [node for node in folded.operations() if node.op == "mul" and any(child.op == "constant" for child in node.inputs)]
  assert len(constant) == 4 and all(program.elements(node.shape[1:-1]) == 1 for node in constant)


def test_batch_norm_vanishes_in_the_convolution_that_it_follows():
  _, _, _, folded = both("resnet, batch")
  counts = collections.Counter(node.op for node in folded.operations())
  # What is left: the first norm of each block but the first, and the last norm, which read sums.
  assert counts["mul"] == 4 and counts["rsqrt"] == 0


def test_a_skip_gain_of_zero_and_shared_values_stay_right():
  network, size = networks.make("nfnet")
  gains = nnx.state(network, lambda path, _: "skip_gain" in path)
  nnx.update(network, jax.tree.map(lambda gain: gain * 0, gains))
  images = networks.images(size)
  folded = fold(program.of_network(network, images.shape))
  assert networks.difference(jax.jit(folded)(images), nnx.jit(lambda network, images: network(images))(network, images)) <= 1e-5


@pytest.mark.parametrize("name", ["nfnet", "resnet, batch"])
def test_bfloat16_is_as_near_to_float32_as_unfolded(name):
  exact, size = networks.make(name)
  _, images, whole, folded = both(name, dtype="bfloat16")
  expected = nnx.jit(lambda network, images: network(images))(exact, images)
  error = lambda program: networks.difference(jax.jit(program)(images), expected)
  assert error(folded) <= max(2 * error(whole), 0.02)


def test_pixels_are_normalised_inside():
  network, size = networks.make("nf_resnet")
  pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
  mean, std = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
  folded = fold(program.of_network(network, pixels.shape, (mean, std)))
  expected = nnx.jit(lambda network, images: network(images))(network, (pixels - np.float32(mean)) / np.float32(std))
  assert networks.difference(jax.jit(folded)(pixels), expected) <= 1e-5


def test_programs_with_shared_convolutions_compute_them_once():
  """The value of a convolution is read three times: as it is, scaled, and through a sum."""
  kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 4)).astype(np.float32)

  def fn(kernel, images):
    out = convolution.convolve(images, kernel)
    return out * 3 + jax.nn.relu(out) + out.sum((1, 2))[:, None, None, :] * 2.0

  images = networks.images(8)
  folded = fold(program.trace(fn, kernel, images.shape))
  assert [node.op for node in folded.operations()].count("conv_general_dilated") == 1
  assert networks.difference(folded(images), fn(kernel, images)) <= 1e-6
