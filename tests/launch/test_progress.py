"""The programs' progress meter prints lines where there is no terminal, and shows a bar where there is one."""

import io

import pytest
import rich.console

from launch import progress


@pytest.mark.parametrize("every, lines", [(1e9, 1), (0.0, 4)])
def test_without_a_terminal_there_are_lines_with_rate_and_time_left(every, lines, monkeypatch):
  monkeypatch.setattr(progress, "LINE_EVERY_S", every)
  out = io.StringIO()
  with progress.meter(rich.console.Console(file=out, width=200), "train", 1000, "records", 400) as meter:
    for _ in range(4):
      meter.advance(150)
  said = out.getvalue().splitlines()
  assert len(said) == lines and meter.done == 1000
  assert said[-1].startswith("train: 1,000 of 1,000 records, ") and said[-1].endswith(" records/s")
  assert all(line.endswith(" s left") for line in said[:-1])


def test_on_a_terminal_there_is_a_bar_that_goes_away(monkeypatch):
  out = io.StringIO()
  console = rich.console.Console(file=out, width=200, force_terminal=True)
  with progress.meter(console, "train", 10, "records") as meter:
    meter.set(4)
    meter._bar.refresh()
    assert "4/10" in out.getvalue() and "records/s" in out.getvalue() and meter.rate > 0
  assert out.getvalue().endswith("\x1b[2K")
