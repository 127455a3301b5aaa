"""Weights that lie elsewhere, with stand-ins for huggingface_hub and the network."""

import hashlib
import io
import pathlib
import sys
import types
import urllib.error

import pytest

from nfnets.train.initial import read_weights
from nfnets.weights import remote
from nfnets.weights.errors import WeightsError

ADDRESS = f"{remote.BUCKET}F3_haiku.npz"


class LocalEntryNotFoundError(Exception):
  """What huggingface_hub raises without a network for what is not in its cache."""


def hub(monkeypatch, download) -> None:
  monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=download))


def raising(error: Exception):
  def call(*_, **__):
    raise error

  return call


def test_the_hubs_file_is_asked_for_by_its_repository(monkeypatch):
  hub(monkeypatch, lambda repository, file: f"/cache/{repository}/{file}")
  assert remote.local("hf://timm/nfnet_l0.ra2_in1k") == pathlib.Path("/cache/timm/nfnet_l0.ra2_in1k/model.safetensors")
  assert remote.local("timm/nfnet_l0.ra2_in1k") == remote.local("hf://timm/nfnet_l0.ra2_in1k")
  for path in ("runs/digits", pathlib.Path("x.npz")):
    assert remote.local(path) == path


def test_a_path_that_is_there_is_no_repository(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "timm" / "mine").mkdir(parents=True)
  assert remote.local("timm/mine") == "timm/mine"


@pytest.mark.parametrize(
  ("source", "error", "message"),
  [
    ("hf://timm/x", LocalEntryNotFoundError("long\ntext"), "hf://timm/x is not in huggingface_hub's cache.*: no network$"),
    ("hf://timm/x", RuntimeError("404 Client Error\nmore"), "could not be fetched: 404 Client Error$"),
    ("hf://timm", None, "expected hf://OWNER/NAME"),
    ("hf://timm/x/y", None, "expected hf://OWNER/NAME"),
    ("https://example.org/F0_haiku.npz", None, "expected hf://OWNER/NAME, a path, or one of"),
    (f"{remote.BUCKET}../x", None, "expected hf://OWNER/NAME, a path, or one of"),
  ],
)
def test_what_cannot_be_had_is_one_line(monkeypatch, source, error, message):
  hub(monkeypatch, raising(error or AssertionError("not to be called")))
  with pytest.raises(WeightsError, match=message):
    read_weights(source)


def test_without_huggingface_hub_it_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(WeightsError, match="pip install huggingface_hub"):
    remote.local("hf://timm/x")


def test_a_published_file_is_kept_once_its_sum_is_right(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  answers = [b"not it", b"content"]
  monkeypatch.setattr(remote.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(answers.pop(0)))
  monkeypatch.setattr(remote, "PUBLISHED", {hashlib.md5(b"content", usedforsecurity=False).hexdigest(): "nfnet_f3"})
  with pytest.raises(WeightsError, match="it was not kept"):
    remote.local(ADDRESS)
  assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
  for _ in range(2):  # the second time from the cache
    assert pathlib.Path(remote.local(ADDRESS)).read_bytes() == b"content"


def test_no_network_is_one_line(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr(remote.urllib.request, "urlopen", raising(urllib.error.URLError("Name or service not known")))
  with pytest.raises(WeightsError, match="could not be fetched: Name or service not known"):
    remote.local(ADDRESS)
