"""Every field of the configuration has a rule and a comment; no rule accepts NaN, and messages say what was expected."""

import dataclasses
import importlib
import json
import math

import pytest

from nfnets.config import Config, DataConfig, InitConfig, ModelConfig, OptimConfig, text
from nfnets.errors import UserError

SECTIONS = {"run": Config, "data": DataConfig, "model": ModelConfig, "optim": OptimConfig, "init": InitConfig}
FIELDS = [(name, field.name) for name, section in SECTIONS.items() for field in dataclasses.fields(section)]


@pytest.mark.parametrize("name", SECTIONS)
def test_every_field_has_a_rule(name):
  rules = importlib.import_module(f"nfnets.config.{name}")._RULES
  assert set(rules) == {field.name for field in dataclasses.fields(SECTIONS[name])}


@pytest.mark.parametrize("name, field", [pair for pair in FIELDS if pair[1] not in ("model", "data", "optim", "init")])
def test_no_field_takes_nan_or_what_is_of_no_use(name, field):
  for value in (math.nan, object()):
    with pytest.raises(UserError, match=rf"{SECTIONS[name].__name__}.{field} = .*: expected "):
      SECTIONS[name](**{field: value}).validate()


@pytest.mark.parametrize(
  "section, changes, message",
  [
    (Config, {"batch": True}, "Config.batch = True: expected a whole number >= 1."),
    (Config, {"seed": 2**32}, "Config.seed = 4294967296: expected a whole number in [0, 4,294,967,296)."),
    (Config, {"spike": 0.5}, "Config.spike = 0.5: expected a factor > 1 (or 0: any loss will do)."),
    (Config, {"on_bad_step": "skp"}, "expected one of 'stop', 'skip', 'rollback'. Did you mean 'skip'?"),
    (DataConfig, {"crop_area": (0.01, 0.05)}, "expected two numbers, 0 < least <= most, 0.1 <= most <= 1."),
    (DataConfig, {"std": (1.0, 0.0, 1.0)}, "expected three numbers > 0."),
    (ModelConfig, {"drop_rate": 1.0}, "ModelConfig.drop_rate = 1.0: expected a probability, 0 ≤ rate < 1."),
    (OptimConfig, {"nesterov": "yes"}, "OptimConfig.nesterov = 'yes': expected True, False or None."),
    (OptimConfig, {"agc_exclude": ("[",)}, "expected regular expressions, of which '[' is none"),
  ],
)
def test_the_message_names_field_value_and_expectation(section, changes, message):
  with pytest.raises(UserError) as error:
    section(**changes).validate()
  assert message in str(error.value)


def test_changes_are_the_fields_that_differ():
  config = Config(batch=64, optim=OptimConfig(clipping=None))
  config.data.mean = (1.0, 2.0, 3.0)
  assert text.changes(config).splitlines()[1:] == [
    "  config.batch = 64",
    "  config.data.mean = (1.0, 2.0, 3.0)",
    "  config.optim.clipping = None",
  ]


def test_a_configuration_comes_back_from_json():
  config = Config(
    batch=64, model=ModelConfig(overrides={"remat": True}), optim=OptimConfig(clipping=math.inf, agc_exclude=("^a$", "b"))
  )
  saved = json.loads(json.dumps(dataclasses.asdict(config)))
  assert text.from_json(saved) == config
  del saved["optim"]["sam_rho"]  # newer than the file
  assert text.from_json(saved) == config
  saved["optim"]["of_tomorrow"] = 3
  with pytest.raises(UserError, match=r"config\.optim\.of_tomorrow = 3 is no field of this nfnets.* expected --config=FILE"):
    text.from_json(saved)


@pytest.mark.parametrize("name", SECTIONS)
def test_every_field_has_a_comment_of_its_own_or_shares_one(name):
  """A field without a comment stands right below the one whose comment speaks of both."""
  comments = text._comments(SECTIONS[name])
  shared = {
    "eval_batch",
    "loss",
    "checkpoint_every",
    "keep_every",
    "keep_best",
    "spike",
    "max_bad_steps",
    "test_split",
    "label_key",
  }
  shared |= {"test_image_size", "crop_aspect", "flip", "augment_before_mix", "randaugment_magnitude", "std", "sam_share"}
  assert {field for field, comment in comments.items() if not comment} <= shared | {"model", "data", "optim", "init"}
