"""The steps between two lines of the log: how long the devices waited, and what is written of numbers that are not finite."""

import contextlib
import json
import time

import pytest

from nfnets.train.logs.logbook import Logbook, read_jsonl
from nfnets.train.logs.window import Window


def test_waiting_counts_only_from_when_the_devices_have_ended_their_step():
  """Data that comes every 0.3 s, steps of 0.2 s: the devices wait a third of the time, not always."""

  class Step:
    def block_until_ready(self):
      time.sleep(0.2)

  def batches(period):
    for _ in range(4):
      time.sleep(period)
      yield None

  for period, least, most in ((0.3, 0.15, 0.6), (0.0, 0.0, 0.05)):
    with contextlib.closing(Window()) as steps:
      for number, _ in enumerate(steps.batches(batches(period))):
        steps.add({"count": Step()})
        if number == 0:
          steps.restart_clock()
        if not period:
          steps._end.result()
      assert least <= steps.waiting_share() <= most and steps.seconds_per_step() > 0
      steps.clear()
      assert steps.waiting_share() < 0.01 and steps.seconds_per_step() is None


def test_numbers_that_are_not_finite_are_null_in_the_record_and_drawn_as_gaps(tmp_path):
  log = Logbook(str(tmp_path))
  log.begin(0, 10)
  scalars = {"epoch": 0.1, "loss": float("nan"), "top1": 0.5, "lr": 0.1, "grad_norm": float("inf")}
  log.train(1, scalars, {}, 1.0)
  log.train(2, {**scalars, "epoch": 0.2, "loss": 1.0}, {}, 1.0)
  log.close()
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  first = json.loads(lines[0], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
  assert first["loss"] is None and first["grad_norm"] is None and read_jsonl(tmp_path / "metrics.jsonl")[1]["loss"] == 1.0
  again = Logbook(str(tmp_path))
  again.begin(2, 10)
  assert again.draw() is not None
  again.close()
