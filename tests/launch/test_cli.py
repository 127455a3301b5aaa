"""`launch.cli.main` answers a person's mistake with one line and status 2, and keeps the traceback of a bug."""

import os
import pathlib
import subprocess
import sys

import pytest

from launch import cli, with_huge_pages
from nfnets import distributed
from nfnets.data.errors import DataError
from nfnets.distributed.errors import LostPeer, ProcessError
from nfnets.errors import UserError
from nfnets.train.checkpoints.errors import CheckpointError, SaveError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run_main(monkeypatch, program, *arguments: str, define=lambda values: None) -> None:
  monkeypatch.setattr(sys, "argv", ["program", *arguments])
  cli.main(program, define, "usage")


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is that of glibc")
@pytest.mark.parametrize(
  "command, environment, again",
  [
    ("python -m launch.train --config=c", {}, True),
    ("python -u -X dev -m launch.train", {}, False),  # "dev" may be a script: nothing is started again where that is not clear
    ("python -u -m launch.train", {}, True),
    ("python -m launch.train", {"GLIBC_TUNABLES": "glibc.malloc.check=1"}, False),
    ("python -m pytest -m launch.train", {}, False),
    ("python script.py -m launch.train", {}, False),
    ("python -c pass", {}, False),
    ("python", {}, False),
  ],
)
def test_programs_alone_start_again_with_huge_pages(command, environment, again):
  changed = {"HOME": "/", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if again else None
  assert with_huge_pages(command.split(), {"HOME": "/", **environment}) == changed


def not_a_number(values):
  return int("x")


def unpack_too_much(values):
  first, second = [1, 2, 3]
  return first + second


def zip_unequal(values):
  return list(zip([1], [], strict=True))


def raise_plain(values):
  raise ValueError("not what the caller should have given")


@pytest.mark.parametrize("bug", [not_a_number, unpack_too_much, zip_unequal, raise_plain])
def test_a_value_error_that_is_no_persons_mistake_keeps_its_traceback(bug, monkeypatch):
  with pytest.raises(ValueError) as raised:
    run_main(monkeypatch, bug)
  assert raised.traceback[-1].name == bug.__name__


def test_a_bug_ends_the_program_with_its_traceback_and_status_1():
  source = f"from launch import cli; from {__name__} import not_a_number; cli.main(not_a_number, lambda values: None, '')"
  environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{pathlib.Path(__file__).parent}", "JAX_PLATFORMS": "cpu"}
  ended = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=60)
  assert ended.returncode == 1 and ended.stderr.startswith("Traceback") and 'return int("x")' in ended.stderr


@pytest.mark.parametrize(
  "error, status",
  [
    (UserError("wrong"), 2),
    (cli.UsageError("wrong"), 2),
    (DataError("wrong"), 2),
    (ProcessError("wrong"), 2),
    (CheckpointError("wrong"), 2),
    (LostPeer("wrong"), distributed.LOST),
    (FloatingPointError("wrong"), 1),
    (SaveError("wrong"), 1),
    (KeyboardInterrupt(), 130),
  ],
)
def test_errors_with_a_status_are_one_line(error, status, monkeypatch, capsys):
  def program(values):
    raise error

  def end_process(status):
    raise SystemExit(status)

  monkeypatch.setattr(os, "_exit", end_process)  # Ctrl-C ends the process without the interpreter's own end
  with pytest.raises(SystemExit) as stopped:
    run_main(monkeypatch, program)
  assert stopped.value.code == status
  assert capsys.readouterr().err == f"error: {str(error) or 'interrupted'}\n"
