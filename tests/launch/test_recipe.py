"""--config and the flags for its fields: what they change, what --help says of them, and mistakes in one line."""

import dataclasses
import pathlib
import sys

import pytest

from launch import cli, recipe
from nfnets import models
from nfnets.config import Config

ROOT = pathlib.Path(__file__).resolve().parents[2]
DIGITS = "--config=configs/digits.py"


def read(monkeypatch, *arguments: str) -> Config:
  """The configuration that a program gets for these arguments."""
  configs = []
  monkeypatch.chdir(ROOT)
  monkeypatch.delitem(sys.modules, "config_config", raising=False)  # a recipe is loaded into the module of the one before it
  monkeypatch.setattr(sys, "argv", ["program", *arguments])
  with pytest.raises(SystemExit) as stopped:
    cli.main(lambda values: configs.append(recipe.parse(values)), recipe.define, "usage")
  if stopped.value.code:
    raise stopped.value
  return configs[0]


@pytest.mark.parametrize(
  "flag, field, value",
  [
    ("--config.model.overrides.width=(8,16,32,64)", "width", (8, 16, 32, 64)),
    ("--config.model.overrides.remat=true", "remat", True),
    ("--config.model.overrides.group_rounding=nearest", "group_rounding", "nearest"),
    ("-config.model.overrides={'stem_strides': (1, 1, 1, 1)}", "stem_strides", (1, 1, 1, 1)),
  ],
)
def test_any_field_of_the_models_variant_can_be_overridden(flag, field, value, monkeypatch):
  config = read(monkeypatch, DIGITS, flag, "--config.batch=64")
  assert config.model.overrides == {field: value} and config.batch == 64
  assert getattr(models.variant(config.model.name, **config.model.all_overrides()), field) == value


def test_a_normalizer_free_resnet_takes_a_norm_on_the_command_line(monkeypatch):
  config = read(monkeypatch, "--config=configs/nf_resnet.py", "--config.model.overrides.norm=group:8")
  row = models.variant(config.model.name, **config.model.all_overrides())
  assert type(row) is type(models.variant("resnet50")) and row.norm == "group:8"


def test_overrides_add_to_those_of_the_recipe(monkeypatch, tmp_path):
  file = tmp_path / "recipe.py"
  file.write_text(
    "from nfnets.config import Config, ModelConfig\n"
    "def get_config(arg=''):\n"
    "  return Config(model=ModelConfig(name='nfnet_digits', overrides={'depth': (1,) * 4, 'width': (8,) * 4}))\n"
  )
  config = read(
    monkeypatch, f"--config={file}", "--config.model.overrides.width=(8,8,8,16)", "--config.model.overrides.alpha=0.5"
  )
  assert config.model.overrides == {"depth": (1,) * 4, "width": (8, 8, 8, 16), "alpha": 0.5}


@pytest.mark.parametrize(
  "arguments, expected",
  [
    (
      [DIGITS, "--config.model.overrides.width=2"],
      "config.model.overrides: nfnet_digits: width=2, expected a tuple of positive ints",
    ),
    ([DIGITS, "--config.model.overrides.norm=batch"], "config.model.overrides: nfnet_digits has no field 'norm'"),
    (
      [DIGITS, "--config.model.overrides.widht=2"],
      "config.model.overrides.widht: nfnet_digits has no field 'widht'; its fields: act",
    ),
    ([DIGITS, "--config.model.overrides.width", "2"], "overrides.width: expected a value behind an equals sign"),
    ([DIGITS, "--config.model.overrides=2"], "--config.model.overrides=2: expected a mapping"),
    ([DIGITS, "--config.shard=maybe"], "error: --config.shard=maybe: expected true or false\n"),
    ([DIGITS, "--config.data.flip=2"], "error: --config.data.flip=2: expected true or false\n"),
    ([DIGITS, "--config.batch=many"], "error: --config.batch=many: expected a whole number\n"),
    ([DIGITS, "--config.optim.clipping=low"], "error: --config.optim.clipping=low: expected a number\n"),
    ([DIGITS, "--noconfig.shard=1"], "--noconfig.shard=1: expected no value"),
    ([DIGITS, "--noconfig.batch"], "--noconfig.batch: config.batch is no field that is true or false"),
    (["--config.batch=3"], "--config.batch=3 changes a field of a recipe, but none is given: --config=FILE is missing"),
    (
      ["--config=nfnets/errors.py"],
      "--config=nfnets/errors.py: no get_config in this file; expected a Python file with a function",
    ),
    (["--config=configs"], "configs is a directory, expected a Python file"),
    (["--config=README.md"], "README.md, line "),
    (["--config=tests/golden/agc.npz"], "--config=tests/golden/agc.npz: this file is no text; expected a Python file"),
  ],
)
def test_mistakes_in_flags_are_one_line_and_status_2(arguments, expected, monkeypatch, capsys):
  with pytest.raises(SystemExit) as stopped:
    read(monkeypatch, *arguments)
  said = capsys.readouterr().err
  assert stopped.value.code == 2 and expected in said and said.startswith("error: ") and said.count("\n") == 1


def test_get_config_without_an_argument_is_named(monkeypatch, tmp_path, capsys):
  file = tmp_path / "recipe.py"
  file.write_text("def get_config():\n  return None\n")
  with pytest.raises(SystemExit):
    read(monkeypatch, f"--config={file}:x")
  assert f"--config={file}: get_config() takes 0 positional arguments but 1 was given; expected" in capsys.readouterr().err


def test_help_lists_every_field_with_its_comment_default_and_value(monkeypatch, capsys):
  with pytest.raises(IndexError):  # the program itself does not run
    read(monkeypatch, DIGITS, "--config.optim.base_lr=0.7", "--help")
  lines = capsys.readouterr().out.splitlines()
  lines = lines[lines.index("field                              default                value") :]
  assert max(map(len, lines)) <= 80
  names = {line.split()[0] for line in lines if line.startswith("config.")}
  sections = {"model", "data", "optim", "init"}
  expected = {f"config.{field.name}" for field in dataclasses.fields(Config) if field.name not in sections}
  for section in sections:
    expected |= {f"config.{section}.{field.name}" for field in dataclasses.fields(getattr(Config(), section))}
  assert names == expected
  place = next(number for number, line in enumerate(lines) if line.startswith("config.optim.base_lr "))
  assert lines[place].split() == ["config.optim.base_lr", "0.1", "*", "0.7"]
  assert lines[place - 2].startswith("  # Peak learning rate per 256 images")
  assert "config.batch                       256                    * 128" in lines


@pytest.mark.parametrize(
  "source, expected",
  [
    (
      "from nfnets.errors import UserError\ndef get_config(arg):\n  raise UserError(f'takes a or b, got {arg!r}')",
      "takes a or b, got 'x'",
    ),
    ("def get_config(arg):\n  raise ValueError(f'takes a or b, got {arg!r}')", "recipe.py, line 2: takes a or b, got 'x'"),
    ("def get_config(arg):\n  raise ValueError('Error: of Error: kinds')", "recipe.py, line 2: Error: of Error: kinds"),
    ("def get_config(arg):\n  return {'a': 1}[arg]", "recipe.py, line 2: KeyError: 'x'"),
    ("\ndef get_config(arg):\n  return 1 / 0", "recipe.py, line 3: ZeroDivisionError: division by zero"),
    ("from nfnets.config import Config\ndef get_config(arg):\n  return Config(bacth=1)", "recipe.py, line 3: TypeError: "),
    ("import nothing_of_this_name\n", "recipe.py, line 1: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    ("def get_config(arg:\n", "recipe.py, line 1: SyntaxError: "),
  ],
)
def test_mistakes_in_a_recipe_are_one_line(source, expected, tmp_path, monkeypatch, capsys):
  file = tmp_path / "recipe.py"
  file.write_text(source)
  with pytest.raises(SystemExit) as stopped:
    read(monkeypatch, f"--config={file}:x")
  said = capsys.readouterr().err
  assert stopped.value.code == 2 and said.startswith("error: ") and expected in said and said.count("\n") == 1


def test_a_bug_of_ours_that_a_recipe_meets_keeps_its_traceback(tmp_path, monkeypatch):
  file = tmp_path / "recipe.py"
  file.write_text("from tests.launch.test_cli import raise_plain\ndef get_config(arg):\n  return raise_plain(arg)\n")
  with pytest.raises(Exception, match="raise_plain"):
    read(monkeypatch, f"--config={file}:x")
