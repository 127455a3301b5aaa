"""The figures of `launch.bench data` follow from what was counted. No test needs TensorFlow or checks a duration."""

import dataclasses
import io
import json
import subprocess

import pytest

from launch import bench as launch_bench, cli
from nfnets.config import DataConfig
from nfnets.data.errors import DataError
from nfnets.measure import data, tfdata
from nfnets.measure.data_report import CROP, OURS, PEERS, PHASES, RECIPE, DataReport, Measured, Measurement

DIGITS = DataConfig(
  name="digits", shift=1, mix="mixup_cutmix", augment="randaugment", randaugment_layers=2, randaugment_magnitude=5
)
PHOTOS = dataclasses.replace(DIGITS, name="photos", train_crop="inception", image_size=64, shift=0, flip=True)


def result(**changes) -> Measured:
  figures = dict(
    images=100,
    batch_bytes=1000,
    import_s=1.0,
    setup_s=0.5,
    setup_cpu_s=0.4,
    first_batch_s=0.6,
    wall_s=2.0,
    cpu_s=4.0,
    peak_bytes=300,
    imported_bytes=100,
    times={},
    versions={},
  )
  return Measured(**{**figures, **changes})


def job(pipeline: str = OURS, group: str = CROP) -> Measurement:
  return Measurement(pipeline=pipeline, group=group, data=PHOTOS, batch=10, steps=10, threads=2)


@pytest.fixture(scope="module")
def report() -> DataReport:
  seen = []
  jobs = data.measurements(DIGITS, batch=50, images=1501, threads=2, seed=3)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(data, "measure_apart", data.measure)  # saves seconds; a real process has a test of its own
    report = data.compare(jobs, rounds=2, progress=lambda number, job, result: seen.append((number, job, result)))
  # in turn, each announced before and reported after
  assert [(number, job, result is None) for number, job, result in seen] == [
    (number, job, before) for number in range(2) for job in jobs for before in (True, False)
  ]
  assert [result for _, _, result in seen if result] == [report.results[i][n] for n in range(2) for i in range(len(jobs))]
  return report


def test_ours_makes_exactly_the_images_asked_for(report):
  assert [(job.group, job.data.mix, job.data.shift) for job in report.jobs] == [(CROP, "none", 0), (RECIPE, "mixup_cutmix", 1)]
  plain, whole = report.results
  for measured in (*plain, *whole):
    assert measured.images == 31 * 50
    assert measured.peak_bytes >= measured.imported_bytes > 1e7
    assert measured.setup_s < measured.first_batch_s < measured.setup_s + measured.wall_s
    assert 0 < sum(measured.times.values()) <= measured.cpu_s
    assert measured.versions["opencv"]
  pixels = 50 * 8 * 8 * 3
  assert plain[0].batch_bytes == pixels + 4 * 50  # the labels
  assert whole[0].batch_bytes == pixels + 3 * 4 * 50  # also mix_label and ratio
  assert report.shares(0).keys() == set(PHASES)
  assert sum(report.shares(1).values()) == pytest.approx(1)
  assert report.shares(1)["augment"] > 0 == report.shares(0)["augment"]


def test_the_line_of_json_and_the_table_hold_what_was_measured(report):
  line = json.loads(json.dumps(report.to_json()))
  assert line["images"] == 1550 and line["threads"] == 2 and line["ratios"] == []
  for row, job, rounds in zip(line["rows"], report.jobs, report.results, strict=True):
    assert (row["pipeline"], row["group"]) == (job.pipeline, job.group)
    assert row["images_per_s"] == pytest.approx(sum(1550 / measured.wall_s for measured in rounds) / 2)
    assert [figures["cpu_s"] for figures in row["rounds"]] == [measured.cpu_s for measured in rounds]
  assert [column.header for column in report.table().columns][1:3] == ["images/s", "images per CPU-s"]


def test_a_job_survives_json():
  for measurement in data.measurements(PHOTOS, batch=8, images=20, threads=3, seed=7, against=True):
    assert Measurement.from_json(measurement.to_json()) == measurement
    assert measurement.steps == 3 and measurement.data.threads == 3


def test_what_is_measured_beside_ours():
  make = lambda config, **options: data.measurements(config, batch=8, images=8, threads=1, **options)
  plan = lambda config, **options: [(job.pipeline, job.group) for job in make(config, **options)]
  tuned, official = PEERS
  assert plan(PHOTOS, against=True) == [(OURS, CROP), (tuned, CROP), (OURS, RECIPE), (official, RECIPE)]
  assert plan(dataclasses.replace(PHOTOS, augment="autoaugment"), against=True) == [(OURS, CROP), (tuned, CROP), (OURS, RECIPE)]
  bare = dataclasses.replace(PHOTOS, mix="none", augment="none")
  assert plan(bare, against=True) == [(OURS, CROP), (tuned, CROP)]
  assert plan(bare) == [(OURS, RECIPE)]
  ours, theirs, *_ = make(PHOTOS, against=True)
  assert ours.data == theirs.data  # both do the same work


def test_ratios_are_of_the_medians_and_of_each_round():
  jobs = (job(), job("tf.data, tuned"), job(group=RECIPE), job("tf.data, official structure", RECIPE))
  cpu = ((1.0, 2.0, 4.0), (2.0, 8.0, 5.0), (1.0, 1.0, 1.0), (5.0, 6.0, 10.0))
  report = DataReport(jobs=jobs, results=tuple(tuple(result(cpu_s=s) for s in rounds) for rounds in cpu))
  crop, recipe = report.ratios
  assert (crop.peer, crop.ratio, crop.wanted) == ("tf.data, tuned", pytest.approx(5 / 2), 1.15)
  assert crop.rounds == pytest.approx((2, 4, 1.25))
  assert (recipe.ratio, recipe.wanted) == (pytest.approx(6), 5.0)
  assert "decode + crop + flip: 2.50 × the images per CPU-second of tf.data, tuned (1.25 to 4.00" in str(crop)
  assert report.medians(0)["images_per_s"] == 50 and report.medians(0)["own_bytes"] == 200


def test_shares_are_of_the_work_of_all_rounds():
  rounds = (result(times={"read": 1.0, "decode": 2.0}), result(times={"read": 0.0, "decode": 1.0}))
  assert DataReport(jobs=(job(),), results=(rounds,)).shares(0) == {"read": 0.25, "decode": 0.75}


def test_what_cannot_be_measured_is_said_in_a_line():
  with pytest.raises(DataError, match="TFRecord form only, got config.data.name='digits'"):
    tfdata.check(DIGITS)
  with pytest.raises(DataError, match="local disk only"):
    tfdata.check(dataclasses.replace(PHOTOS, dir="gs://bucket"))
  with pytest.raises(DataError, match="train_crop='none'"):
    data.measurements(dataclasses.replace(PHOTOS, train_crop="none"), batch=8, images=8, threads=1, against=True)
  with pytest.raises(DataError, match="batch=9"):
    data.measurements(PHOTOS, batch=9, images=9, threads=1, against=True)


def test_a_process_of_its_own_gives_the_same_kind_of_result():
  job = data.measurements(DIGITS, batch=50, images=100, threads=1)[1]
  measured = data.measure_apart(job)
  assert isinstance(measured, Measured) and measured.images == 100
  assert measured.peak_bytes > measured.imported_bytes > 1e7


def child(monkeypatch, *, status: int, stdout: str = "", stderr: str = ""):
  ended = subprocess.CompletedProcess([], status, stdout, stderr)
  monkeypatch.setattr(data.subprocess, "run", lambda *arguments, **options: ended)


def test_a_mistake_found_by_the_process_comes_back_as_one(monkeypatch, capsys):
  nowhere = dataclasses.replace(job(), data=dataclasses.replace(DIGITS, train_split="nowhere"))
  monkeypatch.setattr(data.sys, "stdin", io.StringIO(nowhere.to_json()))
  data.main()
  child(monkeypatch, status=0, stdout=f"chatter\n{capsys.readouterr().out}")
  with pytest.raises(DataError, match="nowhere"):
    data.measure_apart(nowhere)


def test_a_process_that_breaks_shows_its_last_words(monkeypatch):
  child(monkeypatch, status=-9, stderr="Traceback …\nMemoryError")
  with pytest.raises(RuntimeError, match=r"(?s)tf.data, tuned .*ended with status -9.*MemoryError"):
    data.measure_apart(job("tf.data, tuned"))


def values(*arguments: str):
  from absl import flags

  parsed = flags.FlagValues()
  launch_bench.define(parsed)
  parsed(["bench", *arguments])
  return parsed


def test_without_tensorflow_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(tfdata, "missing", lambda: True)
  with pytest.raises(cli.UsageError, match=r"pip install 'nfnets\[peers\]'"):
    launch_bench.data(values("--config=configs/digits.py", "--against=tf.data"))


def test_the_program_prints_a_table_and_a_line_of_json(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(data, "measure_apart", data.measure)
  flags = values("--config=configs/digits.py", "--images=100", "--rounds=1", "--batch=50", f"--json={tmp_path / 'out.json'}")
  assert launch_bench.run(flags, "data") == 0
  out = capsys.readouterr().out
  line = json.loads(out.splitlines()[-1])
  assert line == json.loads((tmp_path / "out.json").read_text())
  assert line["rows"][-1]["rounds"][0]["images"] == 100
  for word in ("images per CPU-s", CROP, RECIPE, OURS, "100 images in batches of 50"):
    assert word in out
