"""How a process ends: by requests to stop, by the watchdog, and with which statuses a launcher starts it again."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from nfnets.distributed import LOST, STOPPED, should_restart
from nfnets.distributed.signals import stop_on_signals

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def default_handlers():
  """Sets the handlers of a fresh process and puts the old ones back, since a signal that ends the process would end the tests."""
  before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  signal.signal(signal.SIGINT, signal.default_int_handler)
  yield before
  for number, handler in before.items():
    signal.signal(number, handler)


def send(*numbers: signal.Signals) -> None:
  for number in numbers:
    os.kill(os.getpid(), number)


def test_any_number_of_sigterms_is_one_request(default_handlers, capfd):
  with stop_on_signals() as stop:
    assert not stop and stop.name == ""
    send(*[signal.SIGTERM] * 5)
    assert stop and stop.name == "SIGTERM"
  said = capfd.readouterr().err
  assert said.count("SIGTERM: saving after this step") == 1 and "Ctrl-C twice (SIGINT) ends at once" in said
  assert signal.getsignal(signal.SIGTERM) == default_handlers[signal.SIGTERM]


def test_the_second_ctrl_c_ends_at_once(default_handlers, capfd):
  with stop_on_signals() as stop:
    send(signal.SIGINT)
    assert stop.name == "SIGINT"
    send(signal.SIGTERM)  # is no second request and does not end the process
    with pytest.raises(KeyboardInterrupt):
      send(signal.SIGINT)
  assert capfd.readouterr().err == "\nSIGINT: saving after this step; Ctrl-C once more (SIGINT) ends at once\n"


def test_after_sigterm_a_person_has_two_ctrl_cs(default_handlers, capfd):
  with stop_on_signals() as stop:
    send(signal.SIGTERM, signal.SIGINT)
    assert stop.name == "SIGTERM"
    with pytest.raises(KeyboardInterrupt):
      send(signal.SIGINT)
  assert "SIGINT: SIGTERM came before, the run is saving already; Ctrl-C once more" in capfd.readouterr().err


def test_another_thread_reads_the_request_and_may_not_make_one(default_handlers):
  seen = []
  with stop_on_signals() as stop:
    send(signal.SIGTERM)
    reader = threading.Thread(target=lambda: seen.append(stop.name))
    reader.start()
    reader.join()

    def listen():
      with stop_on_signals() as request:
        seen.append(bool(request))

    listener = threading.Thread(target=listen)
    listener.start()
    listener.join()
  assert seen == ["SIGTERM", False]


@pytest.mark.parametrize(("context", "interrupts"), [("stop_on_signals", 2), ("prompt_interrupts", 1)])
def test_ctrl_c_ends_at_once_also_while_the_main_thread_computes(context, interrupts):
  """A key derived in very many rounds stands for a compilation: minutes in one call of C code that lets other threads run."""
  source = (
    f"import hashlib\nfrom nfnets.distributed.signals import {context}\nfrom nfnets.distributed import signals\n"
    "signals.GRACE_S = 0.5\n"
    f"with {context}():\n  print('computing', flush=True)\n  hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"
  )
  running = subprocess.Popen(
    [sys.executable, "-c", source], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=0
  )
  assert running.stdout.readline() == "computing\n"
  for _ in range(interrupts):
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
  _, said = running.communicate(timeout=30)
  assert running.returncode == 130
  assert ("saving after this step" in said) is (interrupts == 2)


def run_watched(directory: pathlib.Path, work: str) -> subprocess.CompletedProcess:
  source = (
    "import sys, time\nfrom nfnets.distributed.watchdog import Watchdog\n"
    f"watchdog = Watchdog(1.0, sys.argv[1], 3, first=0.5)\n{work}\nwatchdog.close()\n"
  )
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  return subprocess.run(
    [sys.executable, "-c", source, str(directory)], env=environment, capture_output=True, text=True, timeout=60
  )


def test_the_watchdog_ends_what_hangs_with_its_stacks(tmp_path):
  ended = run_watched(tmp_path, "watchdog.expect('step 7')\ntime.sleep(30)")
  assert ended.returncode == LOST
  assert ended.stderr.startswith("error: step 7 took longer than config.watchdog=1 s; stacks in ")
  assert 'File "<string>", line 5 in <module>' in (tmp_path / "stacks-3.txt").read_text()


def test_the_watchdog_leaves_alone_what_goes_on(tmp_path):
  ended = run_watched(tmp_path, "for step in range(5):\n  time.sleep(0.4)\n  watchdog.expect(f'step {step}')")
  assert ended.returncode == 0 and ended.stderr == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "status, again", [(0, False), (1, False), (2, False), (STOPPED, True), (LOST, True), (128, False), (130, False), (134, True)]
)
def test_what_is_started_again(status, again):
  assert should_restart(status) is again and (STOPPED, LOST) == (75, 76)
