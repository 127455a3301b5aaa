"""An ONNX model gives the logits of the network that it was made of, for any batch, in onnxruntime."""

import pytest
from flax import nnx

from nfnets.export import program
from nfnets.export.fold import fold
from nfnets.export.stablehlo import symbolic_shape
from tests.export import networks

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_onnxruntime_computes_the_networks_logits(name):
  from nfnets.export import onnx

  network, size = networks.make(name)
  nchw = name.startswith("n")  # some one way, some the other
  made = onnx.model(fold(program.of_network(network, symbolic_shape(size))), {"model": name}, nchw=nchw)
  assert {metadata.key: metadata.value for metadata in made.metadata_props} == {"model": f'"{name}"'}
  session = onnxruntime.InferenceSession(made.SerializeToString())
  for batch in (1, 3):
    images = networks.images(size, batch)
    (logits,) = session.run(["logits"], {"images": images.transpose(0, 3, 1, 2) if nchw else images})
    expected = nnx.jit(lambda network, images: network(images))(network, images)
    assert networks.difference(logits, expected) <= 1e-4
