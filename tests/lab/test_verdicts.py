"""Verdicts come from data and from nothing else; records, resumed runs and the report."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from nfnets.config import DataConfig
from nfnets.lab import experiments, records, report, runner, verdict
from nfnets.lab.experiment import Criterion, Experiment, Measured, Settings, conclude

CRITERION = Criterion(name="slope", claim="The slope is about one.", low=0.9, high=1.1)


def experiment(samples, name="made_up", calls=None):
  """An experiment that finds these samples, and notes each call."""

  def run(settings, progress):
    if calls is not None:
      calls.append(name)
    progress(0.5)
    rows = [{"network": "<b>", "slope": 1.0}, {"network": "none", "slope": math.nan}]
    return Measured(samples={"slope": samples}, rows=rows, draw=lambda figure: figure.subplots().plot([1, 2]), caption="A & B.")

  fields = {"title": "Made up", "paper": "Nobody 2020", "section": "1", "claim": "It is so.", "minutes": 0.1}
  return Experiment(name=name, criteria=(CRITERION,), run=run, **fields)


def judged(samples):
  made = experiment(samples)
  return conclude(made, Settings(seeds=len(samples)), made.run(Settings(), lambda share: None))


@pytest.mark.parametrize(
  ("samples", "expected"),
  (
    ([0.98, 1.0, 1.03], "holds"),
    ([0.5, 0.6, 0.55], "does not hold"),
    ([1.3, 1.25, 1.4], "does not hold"),
    ([0.8, 1.0, 1.05], "cannot be told here"),
    ([1.0], "cannot be told here"),
    ([1.0, math.nan, 1.0], "cannot be told here"),
    ([1.0, math.inf, 1.0], "cannot be told here"),
    ([], "cannot be told here"),
  ),
)
def test_verdicts_follow_from_samples(samples, expected):
  result = judged(samples)
  assert result.verdict == expected == result.findings[0].verdict


def test_a_claim_of_several_parts():
  assert verdict.combine(["holds", "holds"]) == "holds"
  assert verdict.combine(["holds", "cannot be told here"]) == "cannot be told here"
  assert verdict.combine(["holds", "cannot be told here", "does not hold"]) == "does not hold"
  assert verdict.combine([]) == "cannot be told here"


def test_bootstrap_of_few_and_of_many_seeds():
  three = verdict.bootstrap([1.0, 2.0, 6.0])
  assert three.mean == 3 and 1 <= three.low < 3 < three.high <= 6 and three == verdict.bootstrap([1.0, 2.0, 6.0])
  samples = np.random.default_rng(0).normal(size=200)
  many = verdict.bootstrap(list(samples))
  assert many.high - many.low == pytest.approx(2 * 1.96 * samples.std() / 200**0.5, rel=0.1)


def test_rank_correlation_needs_an_order():
  assert verdict.rank_correlation([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
  assert math.isnan(verdict.rank_correlation([1, 2, 3], [4, 4, 4])) and math.isnan(
    verdict.rank_correlation([1, 2], [1, math.nan])
  )


def test_a_table_has_intervals_of_its_seeds(tmp_path):
  made = experiment([1.0, 1.0, 1.0])
  rows = lambda settings, progress: dataclasses.replace(
    made.run(settings, progress), rows=[{"network": "a", "gain": [1.0, 2.0, 6.0]}]
  )
  runner.run([dataclasses.replace(made, run=rows)], Settings(), tmp_path, lambda step: None, options="--config=a.py")
  cell = json.loads((tmp_path / "made_up.json").read_text())["rows"][0]["gain"]
  assert cell["mean"] == 3 and 1 <= cell["low"] < 3 < cell["high"] <= 6
  text = (tmp_path / "report.html").read_text()
  assert f"3 [{cell['low']:.3g}, {cell['high']:.3g}]" == report.number(cell) and report.number(cell) in text
  assert "launch.lab made_up --scale=small --seeds=3 --config=a.py" in text


def test_a_model_that_was_edited_is_measured_again(tmp_path):
  calls, file = [], tmp_path / "mine.py"
  settings = Settings(model=f"{file}:make")
  for text in ("a = 1", "a = 1", "a = 2"):
    file.write_text(text)
    runner.run([experiment([1.0, 1.0, 1.0], calls=calls)], settings, tmp_path, lambda step: None)
  assert len(calls) == 2


def test_what_no_criterion_asks_for_is_refused():
  made = experiment([1.0])
  measured = dataclasses.replace(made.run(Settings(), lambda share: None), samples={"other": [1.0]})
  with pytest.raises(KeyError, match="slope"):
    conclude(made, Settings(), measured)


def test_a_run_that_was_stopped_goes_on(tmp_path):
  calls, steps = [], []
  chosen = [experiment([1.0, 1.0, 1.0], name, calls) for name in ("one", "two")]
  runner.run(chosen[:1], Settings(), tmp_path, steps.append)
  runner.run(chosen, Settings(), tmp_path, steps.append)
  assert calls == ["one", "two"]
  assert [step.kept for step in steps if step.record] == [False, True, False]
  runner.run(chosen, Settings(seeds=4), tmp_path, steps.append)  # other settings
  assert calls == ["one", "two", "one", "two"]
  stricter = dataclasses.replace(chosen[0], criteria=(dataclasses.replace(CRITERION, low=0.99),))
  runner.run([stricter], Settings(seeds=4), tmp_path, steps.append)  # another criterion
  (tmp_path / "one.json").write_text('{"format": 1, "half of a')
  runner.run([stricter], Settings(seeds=4), tmp_path, steps.append)
  (tmp_path / "two.png").unlink()
  runner.run(chosen[1:], Settings(seeds=4), tmp_path, steps.append)
  assert calls[4:] == ["one", "one", "two"]
  runner.run(chosen[1:], Settings(seeds=4), tmp_path, steps.append, again=True)
  assert calls[7:] == ["two"] and all(step.left_s >= 0 for step in steps)


def test_another_code_is_measured_anew(tmp_path, monkeypatch):
  calls = []
  chosen = [experiment([1.0, 1.0, 1.0], "one", calls)]
  runner.run(chosen, Settings(), tmp_path, lambda step: None)
  assert len(records._code()) == 64
  monkeypatch.setattr(records, "_code", lambda: "another")
  for _ in range(2):
    runner.run(chosen, Settings(), tmp_path, lambda step: None)
  assert calls == ["one", "one"]


def test_a_network_of_the_users_own_is_judged_for_itself(tmp_path):
  """Its parts stand in a table of their own and do not count for the claim; without one there are none."""
  own = dataclasses.replace(CRITERION, name="own", claim="Mine is steep.", low=5.0)
  made = dataclasses.replace(experiment([1.0, 1.0, 1.0], "one"), yours=(own,))
  measured = made.run(Settings(), lambda share: None)
  assert conclude(made, Settings(), measured).yours == ()
  settings = Settings(model="nf_resnet_tiny")
  with pytest.raises(KeyError, match="own"):
    conclude(made, settings, measured)
  result = conclude(made, settings, dataclasses.replace(measured, yours={"own": [1.0, 2.0, 1.0]}))
  assert [finding.verdict for finding in result.yours] == ["does not hold"] and result.verdict == "holds"
  stored = records.record(result, 1.0)
  page = report.page([(stored, b"")])
  assert stored["yours"][0]["name"] == "own" and "of your model" in page and "Mine is steep." in page
  assert "of your model" not in report.page([({**stored, "yours": []}, b"")])


def test_the_report_is_one_file_without_references(tmp_path):
  runner.run([experiment([1.0, 1.0, 1.0], name) for name in ("one", "two")], Settings(), tmp_path, lambda step: None)
  text = (tmp_path / "report.html").read_text()
  assert re.findall(r"""(?:src|href)=["'](?!data:image/png;base64,|#)""", text) == []
  assert "@import" not in text and "url(" not in text and "<script" not in text and "http" not in text
  assert "prefers-color-scheme: dark" in text and "width=device-width" in text
  assert text.count("data:image/png;base64,") == 2 and "&lt;b&gt;" in text and "<b>" not in text
  stored = json.loads((tmp_path / "one.json").read_text())
  assert stored["verdict"] == "holds" and stored["rows"][1]["slope"] is None and stored["findings"][0]["samples"] == [1, 1, 1]
  assert report.figure({"mean": None}) == "no finite number"
  assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"


def test_the_table_of_experiments():
  """Each says paper, section and claim, every criterion ends somewhere, and no identity of two of them is the same."""
  assert len(experiments.names()) == 13
  for name in experiments.names():
    made = experiments.get(name)
    assert made.name == name and made.paper and made.section and made.claim.endswith(".") and 0 < made.minutes <= 3
    assert made.yours or name == "nfify"  # whose claim is on the user's own already
    for criterion in (*made.criteria, *made.yours):
      assert criterion.claim.endswith(".") and criterion.low < criterion.high
      assert math.isfinite(criterion.low) or math.isfinite(criterion.high)
    for settings in (Settings(), Settings(data=DataConfig(name="digits"))):
      assert records.agrees(json.loads(json.dumps(records.identity(made, settings))), made, settings)


def test_what_has_not_learned_decides_nothing():
  assert np.array_equal(verdict.if_learned([1.0, 2.0], [0.19, 0.21], 10), [math.nan, 2.0], equal_nan=True)
  assert np.array_equal(verdict.if_learned([1.0, 2.0], [0.7, 0.8], 2), [math.nan, 2.0], equal_nan=True)  # guessing gives a half
  assert math.isnan(verdict.if_learned(1.0, math.nan, 10))
