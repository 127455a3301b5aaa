"""Checkpoints that somebody has made up: each is refused in one line, without the memory and the time that it claims to need."""

import json
import os
import pathlib
import shutil
import tracemalloc

import jax
import pytest
import tensorstore

from nfnets.train.checkpoints import manifest, retention, schema
from nfnets.train.checkpoints.errors import CheckpointError
from nfnets.train.checkpoints.reader import CheckpointReader
from nfnets.train.checkpoints.writer import CheckpointWriter
from nfnets.train.evaluate import evaluate_checkpoint
from tests.faults.checkpoint_faults import FACTS, leftovers, save, small_state

OLD = pathlib.Path(__file__).parent / "written_before_the_rooms"
OLD_OVERRIDES = json.loads((OLD / "checkpoints/7/meta/metadata").read_text())["config"]["model"]["overrides"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("saved")
  save(workdir, 1, 2)
  return workdir


@pytest.fixture
def workdir(saved, tmp_path) -> pathlib.Path:
  return shutil.copytree(saved, tmp_path / "run")


def reseal(step: pathlib.Path, /, **changes) -> None:
  """Writes the manifest anew, so that all digests are right; changes: what it says beside the files, or those."""
  body = json.loads((step / "manifest.json").read_text())
  del body["sha256"]
  manifest.write(step, {})
  files = json.loads((step / "manifest.json").read_text())["files"]
  files.pop("manifest.json", None)
  body = {**body, "files": files, **changes}
  (step / "manifest.json").write_text(manifest._render({name: value for name, value in body.items() if value is not ...}))


def forge_meta(step: pathlib.Path, edit) -> None:
  """Changes the meta data of a step by a function, or replaces their text, and seals them."""
  path = step / "meta" / "metadata"
  if isinstance(edit, str):
    path.write_text(edit)
  else:
    body = json.loads(path.read_text())
    edit(body)
    path.write_text(json.dumps(body))
  reseal(step)


def put(*path_and_value):
  """A function that puts a value into nested mappings, or takes it out of them with `...`."""
  *parents, name, value = path_and_value

  def edit(body) -> None:
    for parent in parents:
      body = body[parent]
    if value is ...:
      del body[name]
    else:
      body[name] = value

  return edit


MALFORMED_META = {
  "no JSON": ("{", "is no JSON"),
  "a list": ("[1, 2]", "expected a mapping from names to values, got a list"),
  "nested": ("[" * 5000 + "]" * 5000, "nested too deeply"),
  "nested less": ('{"schema":' + "[" * 600 + "]" * 600 + "}", "nested too deeply"),
  "section is a number": (put("config", "data", 5), "config.data: expected a mapping from names to values, got 5"),
  "section is a text": (put("config", "optim", "x"), "config.optim: expected a mapping from names to values, got 'x'"),
  "config is a list": (put("config", []), "config: expected a mapping"),
  "dtype": (put("shapes", "model", "params/fc/bias", ["float99", [8]]), "'params/fc/bias': expected dtype and shape"),
  "shape": (put("shapes", "model", "params/fc/bias", ["float32", "x"]), "'params/fc/bias': expected dtype and shape"),
  "shape of a mapping": (put("shapes", "model", {"a": {}}), "'a': expected dtype and shape"),
  "negative": (put("shapes", "ema", "params/fc/bias", ["float32", [-1]]), "'params/fc/bias': expected dtype and shape"),
  "endless": (put("shapes", "ema", "params/fc/bias", ["float32", [2**40, 2**40]]), "expected dtype and shape"),
  "no shapes": (put("shapes", ...), "shapes is missing"),
  "no model": (put("shapes", "model", ...), "shapes.model is missing"),
  "classes": (put("num_classes", "ten"), "num_classes: expected a whole number"),
  "no data": (put("data", None), "data: expected a mapping"),
  "next step": (put("data", "next_step", 1.5), "data.next_step: expected a whole number"),
  "corrupt": (put("data", "corrupt", [1, "x"]), "data.corrupt: expected a list of numbers of records"),
  "versions": (put("versions", {"numpy": ["1"]}), "versions.'numpy': expected a line"),
  "letters for terminals": (put("versions", {"numpy": "\x1b[2J"}), r"versions.'numpy': expected a line"),
  "random numbers": (put("rng", {}), "rng.implementation is missing"),
  "another step": (put("step", 7), "holds step 7"),
}


@pytest.mark.parametrize("case", MALFORMED_META)
def test_malformed_meta_data_are_one_line_and_the_step_before_is_taken(workdir, case):
  edit, expected = MALFORMED_META[case]
  forge_meta(workdir / "checkpoints" / "2", edit)
  said = []
  reader = CheckpointReader(str(workdir), say=said.append)
  assert reader.choose() == 1 and len(said) == 1 and "\n" not in said[0] and expected in said[0]
  with pytest.raises(CheckpointError, match="meta/?d?a?t?a?") as error:
    reader.meta(2)
  assert "\n" not in str(error.value)
  with pytest.raises(CheckpointError):
    reader.choose(2)
  CheckpointWriter(str(workdir), FACTS, keep=9, say=said.append).close()  # which lists manifests and leftovers


MALFORMED_MANIFEST = {
  "files": ({"files": 5}, "files: expected a mapping"),
  "file": ({"files": {"a": 5}}, "files.'a': expected a mapping"),
  "size": ({"files": {"a": {"size": "x", "sha256": ""}}}, "expected a whole number"),
  "digest": ({"files": {"a": {"size": 1, "sha256": 5}}}, "expected a line"),
  "schema": ({"schema": "x"}, "schema: expected a whole number"),
  "no schema": ({"schema": ...}, "schema is missing"),
  "no step": ({"step": ...}, "step is missing"),
  "epoch": ({"epoch": [1]}, "epoch: expected a number of epochs"),
  "endless epoch": ({"epoch": 1e300, "keep": {"newest": 1, "every": 1e-300, "best": ""}}, "expected a number of epochs"),
  "keep": ({"keep": [3]}, "keep: expected a mapping"),
  "best": ({"keep": {"newest": 1, "every": 0.0, "best": 5}}, "keep.best: expected a line"),
  "metrics": ({"metrics": {"top1": "x"}}, "metrics.'top1': expected a number"),
  "no metrics": ({"metrics": ...}, "metrics is missing"),
  "versions": ({"versions": 5}, "versions: expected a mapping"),
  "outside": ({"files": {"../../../etc/passwd": {"size": 1, "sha256": ""}}}, "expected a path inside of the checkpoint"),
  "absolute": ({"files": {"/etc/passwd": {"size": 1, "sha256": ""}}}, "expected a path inside of the checkpoint"),
}


@pytest.mark.parametrize("case", MALFORMED_MANIFEST)
def test_a_malformed_manifest_with_the_right_digest_is_one_line_and_the_step_before_is_taken(workdir, case):
  changes, expected = MALFORMED_MANIFEST[case]
  step = workdir / "checkpoints" / "2"
  reseal(step, **changes)
  said = []
  assert CheckpointReader(str(workdir), say=said.append).choose() == 1
  assert len(said) == 1 and "manifest.json is malformed: " in said[0] and expected in said[0]
  assert manifest.readable(step) is None and len(manifest.verify(step)) == 1
  assert retention.finished_steps(workdir / "checkpoints") == [1] and retention.litter(workdir / "checkpoints") == []
  with pytest.raises(CheckpointError, match="malformed"):
    manifest.read(step)


def test_a_manifest_that_is_no_mapping_is_refused(workdir):
  for text in ("[]", "5", "[" * 5000 + "]" * 5000, '"x"', "\udcff"):
    (workdir / "checkpoints" / "2" / "manifest.json").write_text(text, errors="surrogateescape")
    assert CheckpointReader(str(workdir), say=lambda line: None).choose() == 1


def test_a_newer_schema_is_still_refused_as_newer_whatever_else_is_in_it(workdir):
  reseal(workdir / "checkpoints" / "2", schema=99, versions=5, files="somewhere else")
  with pytest.raises(CheckpointError, match="schema 99; this is schema .*: update nfnets"):
    CheckpointReader(str(workdir)).choose()


def test_fields_of_a_newer_version_are_ignored(workdir):
  forge_meta(workdir / "checkpoints" / "2", put("poems", ["a"]))
  reseal(workdir / "checkpoints" / "2", keep={"newest": 3, "every": 0.0, "best": "", "loveliest": 1}, poems=[1])
  assert CheckpointReader(str(workdir)).choose() == 2


def test_links_and_pipes_are_no_files_of_a_checkpoint(workdir, tmp_path):
  step, outside = workdir / "checkpoints" / "2", tmp_path / "secret"
  outside.write_text("secret")
  (step / "link").symlink_to(outside)
  (step / "loop").symlink_to(step / "loop")
  reseal(step)
  os.mkfifo(step / "pipe")
  files = json.loads((step / "manifest.json").read_text())["files"]
  reseal(step, files={**files, **dict.fromkeys(("pipe", "loop"), {"size": 0, "sha256": "0"})})
  problems = manifest.verify(step)
  assert sorted(problems) == [f"{name} is no file of the checkpoint's own" for name in ("link", "loop", "pipe")]
  retention.remove(step)
  assert outside.read_text() == "secret"


def test_meta_data_as_large_as_a_disk_are_not_read(workdir):
  step = workdir / "checkpoints" / "2"
  for name in ("meta/metadata", "manifest.json"):
    with open(step / name, "r+b") as file:
      file.truncate(2 << 30)  # a file with a hole
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"2,147,483,648 bytes, expected at most 67,108,864"):
      manifest.read_meta(step) if name == "meta/metadata" else manifest.read(step)
    assert tracemalloc.get_traced_memory()[1] < schema.JSON_BYTES
    tracemalloc.stop()


# ---- arrays


def test_claimed_shapes_of_four_tebibytes_are_refused_before_memory_is_taken(workdir):
  step = workdir / "checkpoints" / "2"
  forge_meta(step, put("shapes", "model", "params/fc/bias", ["float32", [1 << 40]]))
  with pytest.raises(CheckpointError, match=r"claims 4,398,04\d,\d{3},\d{3} bytes of arrays, but its files have"):
    CheckpointReader(str(workdir)).restore_weights(2)


def forge_array(step: pathlib.Path, item: str, name: str, **changes) -> None:
  """Changes what the arrays' own files say of one of them."""
  store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{step / item}/"}).result()
  key = f"{name}/.zarray"
  store.write(key, json.dumps({**json.loads(store.read(key).result().value), **changes})).result()
  reseal(step)


def test_arrays_whose_files_record_another_shape_are_refused_before_memory_is_taken(workdir):
  """Meta data that look right, but files that say 4 TiB, in as many parts or in one."""
  step = workdir / "checkpoints" / "2"
  for changes in ({"shape": [1 << 40]}, {"chunks": [1 << 40]}, {"dtype": "<f8"}):
    copy = shutil.copytree(step, workdir / "whole")
    forge_array(step, "model", "params.fc.bias", **changes)
    with pytest.raises(CheckpointError, match=r"params.fc.bias is recorded as .* expected bfloat16 \(8,\)|cannot be read"):
      CheckpointReader(str(workdir)).restore_weights(2)
    with pytest.raises(CheckpointError, match="params.fc.bias is recorded as|cannot be read"):
      CheckpointReader(str(workdir)).restore(2, jax.eval_shape(lambda: small_state(0)))
    shutil.rmtree(step)
    copy.rename(step)
  assert set(CheckpointReader(str(workdir)).restore_weights(2)) == {"blocks/0/kernel", "fc/bias"}


def test_arrays_without_their_files_are_one_line(workdir):
  step = workdir / "checkpoints" / "2"
  (step / "model" / "_METADATA").write_text("[" * 5000)
  reseal(step)
  with pytest.raises(CheckpointError, match="its arrays cannot be read: ") as error:
    CheckpointReader(str(workdir)).restore_weights(2)
  assert "\n" not in str(error.value)


# ---- names of directories


@pytest.mark.parametrize("name", ["²", "007", "+5", "٣", "9" * 200, "1e3", "99999999999", "2147483648", "-1"])
def test_a_directory_that_no_writer_named_is_no_step(workdir, name):
  directory = workdir / "checkpoints"
  (directory / name).mkdir()
  assert retention.steps(directory) == [1, 2] and retention.step_of(name) is None
  assert retention.locate(str(directory / name))[1] is None
  said = []
  CheckpointWriter(str(workdir), FACTS, keep=9, say=said.append).close()
  assert CheckpointReader(str(workdir)).choose() == 2 and said == [] and leftovers(workdir) == [name]


def test_a_name_of_5000_digits_is_no_step():
  assert retention.step_of("9" * 5000) is None and retention.locate(f"/x/checkpoints/{'9' * 5000}")[1] is None


# ---- configurations


@pytest.mark.parametrize(
  ("edit", "expected"),
  [
    (put("config", "optim", {"base_lr": "x"}), "OptimConfig.base_lr = 'x': expected"),
    (put("config", "model", "overrides", {**OLD_OVERRIDES, "depth": [10**9, 1]}), r"depth \(1000000000, 1\)"),
    (put("config", "model", "overrides", {**OLD_OVERRIDES, "width": [10**12, 8]}), r"width \(1000000000000, 8\)"),
    (put("config", "model", "overrides", {**OLD_OVERRIDES, "width": "x"}), "width='x', expected a tuple"),
    (put("config", "data", "test_image_size", 10**6), "on images of 1000000 pixels"),
    (put("config", "poem", 5), "config.poem = 5 is no field"),
  ],
)
def test_an_evaluation_by_a_made_up_configuration_is_one_line(tmp_path, edit, expected):
  shutil.copytree(OLD, tmp_path / "run")
  forge_meta(tmp_path / "run" / "checkpoints" / "7", edit)
  with pytest.raises(CheckpointError, match=f"checkpoints/7: its configuration cannot be used: .*{expected}.* --config=FILE"):
    evaluate_checkpoint(None, str(tmp_path / "run"), say=lambda line: None)


def test_an_evaluation_in_a_huge_batch_takes_no_more_than_the_images_do(tmp_path):
  shutil.copytree(OLD, tmp_path / "run")
  forge_meta(tmp_path / "run" / "checkpoints" / "7", put("config", "eval_batch", 10**12))
  assert evaluate_checkpoint(None, str(tmp_path / "run"), say=lambda line: None).results["params"]["count"] == 360
