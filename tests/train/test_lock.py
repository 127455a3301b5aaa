"""The lock of a workdir lets one run in at a time, and is broken only when its holder is gone."""

import dataclasses
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time

import pytest

from nfnets.errors import UserError
from nfnets.train import lock
from nfnets.train.lock import Holder, WorkdirInUse, workdir_lock


@pytest.fixture
def said():
  return []


def hold(workdir: str, ready) -> None:
  with workdir_lock(workdir, say=lambda line: None):
    ready.send("held")
    ready.recv()


def holder(**changes) -> Holder:
  return dataclasses.replace(
    Holder(host="another", machine="another boot", pid=7, born="x", since="2026-01-01 00:00:00"), **changes
  )


def write(workdir, held: Holder) -> None:
  (workdir / lock.NAME).write_text(json.dumps(dataclasses.asdict(held)))


def test_a_second_run_is_refused_and_a_later_one_is_not(tmp_path, said):
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe()
  first = context.Process(target=hold, args=(str(tmp_path), theirs))
  first.start()
  assert ours.recv() == "held"
  expected = f"--workdir={tmp_path}: another run has it .process {first.pid} on {platform.node()}, since .*expected a workdir"
  with pytest.raises(WorkdirInUse, match=expected), workdir_lock(str(tmp_path), say=said.append):
    pass
  ours.send("go")
  first.join()
  with workdir_lock(str(tmp_path), say=said.append):
    assert (tmp_path / lock.NAME).exists()
  assert not list(tmp_path.iterdir()) and said == []


def test_the_lock_of_a_killed_process_is_broken_with_a_line(tmp_path, said):
  program = (
    "import os, sys; from nfnets.train.lock import workdir_lock\n"
    "lock = workdir_lock(sys.argv[1], say=print); lock.__enter__(); os._exit(9)"
  )
  assert subprocess.run([sys.executable, "-c", program, str(tmp_path)]).returncode == 9
  with workdir_lock(str(tmp_path), say=said.append):
    pass
  assert len(said) == 1 and f"on {platform.node()}" in said[0] and said[0].endswith("which is gone: broken")


def test_a_process_that_has_the_number_of_the_holder_is_not_the_holder(tmp_path, said):
  write(tmp_path, holder(host=platform.node(), machine=lock._machine(), pid=os.getppid(), born="before it"))
  with workdir_lock(str(tmp_path), say=said.append):
    pass
  assert len(said) == 1 and "is gone: broken" in said[0]


def test_on_another_host_a_holder_counts_as_gone_after_its_silence(tmp_path, said, monkeypatch):
  monkeypatch.setattr(lock, "SILENCE_S", 0.4)
  write(tmp_path, holder())
  with workdir_lock(str(tmp_path), say=said.append):
    pass
  assert "waiting up to 0.4 s for a sign of life" in said[0] and said[1].endswith("gave no sign of life for 0.4 s: broken")


def test_on_another_host_a_holder_that_beats_keeps_its_lock(tmp_path, said, monkeypatch):
  monkeypatch.setattr(lock, "SILENCE_S", 5.0)
  write(tmp_path, holder())
  beat = threading.Timer(0.2, lambda: write(tmp_path, holder(beat=1)))
  beat.start()
  with pytest.raises(WorkdirInUse, match="process 7 on another"), workdir_lock(str(tmp_path), say=said.append):
    pass
  beat.join()
  assert (tmp_path / lock.NAME).exists()


def test_the_holder_beats(tmp_path, said, monkeypatch):
  monkeypatch.setattr(lock, "BEAT_S", 0.05)
  with workdir_lock(str(tmp_path), say=said.append):
    deadline = time.monotonic() + 10
    while json.loads((tmp_path / lock.NAME).read_text())["beat"] < 2 and time.monotonic() < deadline:
      time.sleep(0.02)
    assert json.loads((tmp_path / lock.NAME).read_text())["beat"] >= 2
  assert not list(tmp_path.iterdir())


def test_a_holder_that_was_stalled_does_not_write_over_its_successor(tmp_path, said, monkeypatch):
  monkeypatch.setattr(lock, "BEAT_S", 0.05)
  ended = []
  with workdir_lock(str(tmp_path), say=said.append, end=ended.append):
    write(tmp_path, holder(host="the successor's"))
    deadline = time.monotonic() + 10
    while not ended and time.monotonic() < deadline:
      time.sleep(0.02)
  assert len(ended) == 1 and "is now held by process 7 on the successor's" in ended[0]
  assert json.loads((tmp_path / lock.NAME).read_text())["host"] == "the successor's"


def test_another_container_with_this_hosts_name_is_another_machine(tmp_path, said, monkeypatch):
  """Its process numbers are not ours: that none of ours has the holder's number says nothing."""
  monkeypatch.setattr(lock, "SILENCE_S", 5.0)
  write(tmp_path, holder(host=platform.node(), pid=2**22 + 1))
  beat = threading.Timer(0.2, lambda: write(tmp_path, holder(host=platform.node(), pid=2**22 + 1, beat=1)))
  beat.start()
  with pytest.raises(WorkdirInUse), workdir_lock(str(tmp_path), say=said.append):
    pass
  beat.join()


def test_a_lock_that_is_released_while_it_is_waited_for(tmp_path, said, monkeypatch):
  monkeypatch.setattr(lock, "SILENCE_S", 30.0)
  write(tmp_path, holder())
  release = threading.Timer(0.2, (tmp_path / lock.NAME).unlink)
  release.start()
  with workdir_lock(str(tmp_path), say=said.append):
    pass
  release.join()
  assert len(said) == 1 and "waiting up to 30 s" in said[0]


def test_without_hard_links_the_lock_is_made_all_the_same(tmp_path, said, monkeypatch):
  def no_links(source, target):
    raise PermissionError(1, "Operation not permitted")

  monkeypatch.setattr(os, "link", no_links)
  with workdir_lock(str(tmp_path), say=said.append):
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert not lock._create(tmp_path / lock.NAME, holder())
  assert not list(tmp_path.iterdir()) and said == []


@pytest.mark.parametrize("content", ["what is this", "", "[1]", '{"pid": "7"}', '{"host": 1, "machine": 2}', "[" * 5000])
def test_a_lock_that_cannot_be_read_is_broken_after_its_silence(tmp_path, said, monkeypatch, content):
  monkeypatch.setattr(lock, "SILENCE_S", 0.4)
  (tmp_path / lock.NAME).write_text(content)
  with workdir_lock(str(tmp_path), say=said.append):
    pass
  assert len(said) == 2 and said[1].endswith("was left by an unknown process, which gave no sign of life for 0.4 s: broken")


def test_a_file_is_no_workdir(tmp_path, said):
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="cannot be written"), workdir_lock(str(tmp_path / "file"), say=said.append):
    pass
