"""`launch.cli.main` answers a person's mistake with one line and status 2, and keeps the traceback of a bug."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from launch import cli
from nfnets import distributed
from nfnets.data.errors import DataError
from nfnets.distributed.errors import LostPeer, ProcessError
from nfnets.errors import UserError
from nfnets.train.checkpoints.errors import CheckpointError, SaveError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run_main(monkeypatch, program, *arguments: str, define=lambda values: None) -> None:
  monkeypatch.setattr(sys, "argv", ["program", *arguments])
  cli.main(program, define, "usage")


@pytest.mark.parametrize(
  "command, own, expected",
  [
    (["-m", "launch.show"], None, "glibc.malloc.hugetlb=1:glibc.malloc.mxfast=0"),
    (["-u", "-X", "dev", "-m", "launch.show"], None, "glibc.malloc.hugetlb=1:glibc.malloc.mxfast=0"),
    (["-m", "launch.show"], "glibc.malloc.check=1", "glibc.malloc.check=1"),
    (["-c", "import launch.show"], None, None),
    (["launch/show.py"], None, None),
  ],
  ids=str,
)
def test_programs_alone_start_again_with_huge_pages(command, own, expected, tmp_path):
  (tmp_path / "launch").mkdir()
  shutil.copy(ROOT / "launch" / "__init__.py", tmp_path / "launch")
  show = "import json, os, sys\n\nimport launch\n\nprint(json.dumps([os.environ.get('GLIBC_TUNABLES'), sys.argv[1:]]))\n"
  (tmp_path / "launch" / "show.py").write_text(show)
  environment = {"PYTHONPATH": str(tmp_path), **({} if own is None else {"GLIBC_TUNABLES": own})}
  done = subprocess.run(
    [sys.executable, *command, "--a=b c"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
  )
  assert json.loads(done.stdout) == [expected if sys.platform == "linux" else own, ["--a=b c"]]


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


def write_much(values):
  for _ in range(10_000):
    print("a line")


def lose_another_pipe(values):
  raise BrokenPipeError("not that of the output")


@pytest.mark.parametrize("program, said", [(write_much, ""), (lose_another_pipe, "BrokenPipeError: not that of the output\n")])
def test_a_program_whose_reader_has_gone_ends_without_a_word(program, said):
  """As in `… | head -1`; a broken pipe between other programs is a bug."""
  source = f"from launch import cli; import {__name__} as t; cli.main(t.{program.__name__}, lambda values: None, '')"
  environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{pathlib.Path(__file__).parent}", "JAX_PLATFORMS": "cpu"}
  with subprocess.Popen([sys.executable, "-c", source], env=environment, stdout=-1, stderr=-1, text=True) as running:
    if not said:
      running.stdout.close()
    errors = running.stderr.read()
    assert (errors.endswith(said) if said else errors == "") and running.wait(60) == 1


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
