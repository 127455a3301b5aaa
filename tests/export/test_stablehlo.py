"""A StableHLO file gives the logits of the network that it was made of, for any batch, read by jax alone."""

import json
import zipfile

import jax
import pytest
from flax import nnx

from nfnets.export import program, stablehlo
from nfnets.export.fold import fold
from tests.export import networks

pytest.importorskip("flatbuffers")


@pytest.mark.parametrize(("name", "dtype"), [("nfnet", "float32"), ("eca_nfnet_l0", "bfloat16"), ("nf_regnet", "float32")])
def test_jax_computes_the_networks_logits(name, dtype, tmp_path):
  network, size = networks.make(name, dtype=dtype)
  shape, file = stablehlo.symbolic_shape(size), tmp_path / "network.zip"
  stablehlo.write(file, fold(program.of_network(network, shape)), {"model": name})
  with zipfile.ZipFile(file) as archive:
    assert json.loads(archive.read("about.json")) == {"model": name}
    exported = jax.jit(jax.export.deserialize(bytearray(archive.read("program"))).call)
  for batch in (1, 3):
    images = networks.images(size, batch)
    expected = nnx.jit(lambda network, images: network(images))(network, images)
    assert networks.difference(exported(images), expected) <= (1e-5 if dtype == "float32" else 0.05)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
  file = tmp_path / "network.zip"
  file.write_text("old")
  double = program.trace(lambda _, images: images * 2, {}, (1, 2))
  with pytest.raises(TypeError, match="not JSON serializable"):
    stablehlo.write(file, double, {"model": object()})
  assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
