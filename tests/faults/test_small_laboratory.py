"""Every experiment's small form ends in three minutes on an idle machine of two cores, and all of them in 25."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from nfnets.lab import experiments

pytestmark = pytest.mark.long
ROOT = pathlib.Path(__file__).resolve().parents[2]
_took = {}


@pytest.mark.parametrize("name", experiments.names())
def test_a_small_form_ends_in_its_time(name, tmp_path, row):
  environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}  # which tests set to compile fast
  command = [sys.executable, "-m", "launch.lab", name, "--compiled=off", f"--out={tmp_path}"]
  subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=900)
  record = json.loads((tmp_path / f"{name}.json").read_text())
  _took[name] = record["seconds"]
  row(f"laboratory, {name}, scale small, 3 seeds", f"{record['seconds']:.0f} s, {record['verdict']}")
  assert record["seconds"] < 180 and sum(_took.values()) < 25 * 60
