"""Layer-wise learning rates and frozen parameters: which factor each layer has, and that nothing moves that is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nfnets import models, optim
from nfnets.agc import agc_metrics, named_leaves
from nfnets.config import OptimConfig
from tests.optim_cases import SHAPES, assert_close, config_with, flatten, make, make_grads, make_params, make_state, run

FROZEN = ("^stem/", "^blocks/0/")
NAMES = ("nfnet_tiny", "nf_resnet_tiny", "nf_regnet_b0", "resnet_tiny", "skipinit_resnet_tiny", "fixup_resnet_tiny")


def by_name(tree):
  """{path: array}, of a dict or an nnx.State."""
  return {path: np.asarray(leaf) for path, leaf, _ in named_leaves(tree)}


def params_of(name):
  return nnx.state(nnx.eval_shape(lambda: models.create(name, rngs=nnx.Rngs(0))), nnx.Param)


# ---- layer-wise learning rates


@pytest.mark.parametrize("name", NAMES)
def test_rates_fall_by_one_factor_a_block_from_the_classifier_down(name):
  params = params_of(name)
  rates = optim.layer_rates(params, OptimConfig(layer_decay=0.5))
  assert list(rates) == [path for path, _, _ in named_leaves(params)]
  blocks = 1 + max(int(path.split("/")[1]) for path in rates if path.startswith("blocks/"))
  for path, rate in rates.items():
    top, *rest = path.split("/")
    tail = {"final_conv": 0.5, "final_norm": 0.5, "bias2": 0.5, "fc": 1.0}
    below = {"stem": 0.5 ** (blocks + 1), "bias1": 0.5 ** (blocks + 1)}
    assert rate == (0.5 ** (blocks - int(rest[0])) if top == "blocks" else {**tail, **below}[top]), path


def test_layers_of_other_names_are_an_error():
  with pytest.raises(ValueError, match=r"layer_decay = 0.5: .*stem/…, blocks/N/… and fc/…, got dense/kernel\. Set layer_decay"):
    make(OptimConfig(layer_decay=0.5), {"dense": {"kernel": jnp.zeros((2, 2))}})


def test_without_layer_decay_the_chain_and_its_bits_are_as_before():
  params = make_params()
  config = config_with()
  off, state = run(make(config, params), params)
  assert list(state) == ["agc", "decay", "momentum", "learning_rate"]
  explicit, _ = run(make(config_with(layer_decay=1.0, frozen=()), params), params)
  jax.tree.map(np.testing.assert_array_equal, off, explicit)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
@pytest.mark.parametrize("kind", ["dict", "state"])
def test_equals_one_optimizer_a_layer_joined_by_optax(name, kind):
  """Every layer is given a whole optimizer of its own, whose base learning rate has the layer's factor."""
  wrap = make_state if kind == "state" else lambda tree: tree
  params = wrap(make_params())
  fields = {"name": name, "clipping": None, "agc_exclude": (), "weight_decay": 0.01}
  layer_of = lambda path: {"fc": "head"}.get(path.split("/")[0], "/".join(path.split("/")[:2]) if "blocks" in path else "stem")
  factors = {"head": 1.0, "blocks/1": 0.5, "blocks/0": 0.25, "stem": 0.125}
  parts = {layer: make(config_with(**fields, base_lr=0.1 * factor), params) for layer, factor in factors.items()}
  paths = [path for path, _, _ in named_leaves(params)]
  labels = jax.tree.unflatten(jax.tree.structure(params), [layer_of(path) for path in paths])
  got, _ = run(make(config_with(**fields, layer_decay=0.5), params), params, wrap=wrap)
  want, _ = run(optax.partition(parts, labels), params, wrap=wrap)
  assert_close(got, want, rtol=1e-5)
  alike, _ = run(make(config_with(**fields), params), params, wrap=wrap)
  assert not np.allclose(by_name(got)["stem/kernel"], by_name(alike)["stem/kernel"])


# ---- frozen parameters


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
@pytest.mark.parametrize("kind", ["dict", "state"])
def test_frozen_parameters_keep_their_bits_and_have_no_moments(name, kind):
  wrap = make_state if kind == "state" else lambda tree: tree
  params = wrap(make_params())
  config = config_with(name=name, weight_decay=0.1, agc_track=True, layer_decay=0.9, frozen=FROZEN)
  got, state = run(make(config, params), params, wrap=wrap)
  before, after = by_name(params), by_name(got)
  frozen = {path for path in SHAPES if path.startswith(("stem/", "blocks/0/"))}
  assert {path for path in SHAPES if np.array_equal(before[path], after[path])} == frozen
  assert agc_metrics(state["agc"]).keys() == SHAPES.keys() - frozen - {"fc/kernel"}
  moments = state["adam" if name == "adamw" else "momentum"]
  held = [path for path in map("".join, flatten(moments)) if any(f"/{part}" in f"/{path}" for part in ("stem/", "blocks/0/"))]
  assert flatten(moments) and held == []


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_the_others_move_as_if_they_were_alone(name):
  params = make_params()
  config = config_with(name=name, clipping=None, agc_exclude=(), frozen=FROZEN)
  got, _ = run(make(config, params), params)
  want, _ = run(make(config_with(name=name, clipping=None, agc_exclude=()), params), params)
  moving = lambda tree: {path: leaf for path, leaf in flatten(tree).items() if not path.startswith(("stem/", "blocks/0/"))}
  jax.tree.map(np.testing.assert_array_equal, moving(got), moving(want))


def test_a_gradient_that_is_not_finite_does_not_reach_frozen_parameters():
  params = make_params()
  grads = jax.tree.map(lambda x: x * np.nan, make_grads(0))
  optimizer = make(config_with(frozen=FROZEN), params)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  assert not np.any(flatten(updates)["stem/kernel"]) and np.isnan(flatten(updates)["fc/bias"]).all()
  zeroed = flatten(optim.zero_frozen(OptimConfig(frozen=FROZEN), grads))
  assert not np.any(zeroed["stem/kernel"]) and np.isnan(zeroed["fc/bias"]).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frozen", [(), ("^stem/",), ("^stem/", "^blocks/[0-1]/"), ("^(?!fc/)",), ("^fc/kernel$",), ("bias",)])
def test_every_parameter_of_our_models_is_in_exactly_one_group(name, frozen):
  params, config = params_of(name), OptimConfig(frozen=frozen)
  groups = optim.default_groups(params, config)
  owners = optim.parameter_groups(params, groups)
  assert {path for path, group in owners.items() if group.frozen} == {
    path for path in owners if optim.groups.is_frozen(config, path)
  }
  assert all(sum(group.matches(path) for group in groups) == 1 for path in owners)
  assert not any(group.frozen and (group.decay or group.clip) for group in groups)


@pytest.mark.parametrize(
  "frozen, message",
  [
    (("^stm/",), r"OptimConfig.frozen: pattern '\^stm/' is found in none of the 13 parameter paths, such as"),
    ((".",), r"OptimConfig.frozen = \('\.',\) leaves no parameter to train"),
  ],
)
def test_patterns_that_freeze_nothing_or_everything_are_refused(frozen, message):
  with pytest.raises(ValueError, match=message):
    make(OptimConfig(frozen=frozen), make_state(make_params()))


@pytest.mark.parametrize("field, value", [("layer_decay", 0.0), ("layer_decay", 1.5), ("frozen", ("(",)), ("frozen", "^stem/")])
def test_values_that_no_field_accepts(field, value):
  with pytest.raises(ValueError, match=f"OptimConfig.{field} = .*: expected"):
    OptimConfig(**{field: value})


def test_the_table_shows_what_is_frozen_and_how_fast_the_others_learn():
  table = optim.describe_groups(make_state(make_params()), OptimConfig(frozen=FROZEN, layer_decay=0.5)).splitlines()
  assert table[0].endswith("learning rate")
  assert table[1].split()[0] == "frozen" and table[1].split()[-3:] == ["0", "off", "0"]
  assert [line.split("  ")[-1].strip() for line in table[2:4]] == ["× 1", "× 0.5…1"]
  assert table[-1].split() == ["all", "13", "620"]
