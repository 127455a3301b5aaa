import importlib
import importlib.util

import pytest

import nfnets.data


def test_without_the_packages_of_the_extra_the_command_that_installs_them_is_told(monkeypatch):
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cv2" else find_spec(name))
  with pytest.raises(ModuleNotFoundError, match=r'^nfnets.data needs cv2: pip install "nfnets\[train\]"$') as caught:
    importlib.reload(nfnets.data)
  assert caught.value.name == "cv2"
