"""Parameter groups: which parameters decay, which AGC clips, and which groups are refused."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from nfnets import models, optim
from nfnets.agc import named_leaves
from nfnets.config import OptimConfig
from tests.optim_cases import CLASSIFIER, SHAPES, assert_close, make, make_grads, make_params, make_state, nest, run


@pytest.mark.parametrize("kind", ["dict", "state"])
def test_default_groups(kind):
  params, config = make_params(), OptimConfig(agc_exclude=CLASSIFIER)
  if kind == "state":
    params, config = make_state(params), OptimConfig()
  owners = optim.parameter_groups(params, optim.default_groups(params, config))
  assert owners.keys() == SHAPES.keys()
  for path, group in owners.items():
    assert group.decay == path.endswith("/kernel") and group.clip == (path != "fc/kernel"), path


@pytest.mark.parametrize(
  "name",
  [
    "nfnet_tiny",
    "eca_nfnet_l0",
    "nf_resnet_tiny",
    "nf_seresnet26",
    "nf_regnet_b0",
    "resnet_tiny",
    "skipinit_resnet_tiny",
    "fixup_resnet_tiny",
  ],
)
def test_default_groups_of_our_models(name):
  params = nnx.state(nnx.eval_shape(lambda: models.create(name, rngs=nnx.Rngs(0))), nnx.Param)
  owners = optim.parameter_groups(params, optim.default_groups(params, OptimConfig()))
  ranks = {path: leaf.ndim for path, leaf, _ in named_leaves(params)}
  assert [path for path, group in owners.items() if not group.clip] == ["fc/kernel"]
  assert {path for path, group in owners.items() if group.decay} == {path for path, rank in ranks.items() if rank > 1}


def test_default_groups_know_haiku_linen_and_unclipped_biases():
  params = nest(
    {
      "nf_net/~/stem/w": jnp.zeros((2, 2)),
      "nf_net/~/stem/b": jnp.zeros(2),
      "norm/scale": jnp.zeros(2),
      "norm/offset": jnp.zeros(2),
      "tokens/embedding": jnp.zeros((5, 2)),
      "x/affine_gain": jnp.zeros(2),
    }
  )
  owners = optim.parameter_groups(params, optim.default_groups(params, OptimConfig(agc_exclude=("/b$", "^tokens/"))))
  assert {path for path, group in owners.items() if group.decay} == {"nf_net/~/stem/w", "tokens/embedding"}
  assert {path for path, group in owners.items() if not group.clip} == {"nf_net/~/stem/b", "tokens/embedding"}


def group(name, *patterns, **fields):
  return optim.ParameterGroup(**{"name": name, "patterns": patterns, "decay": True, "clip": True, **fields})


@pytest.mark.parametrize(
  ("groups", "message"),
  [
    ([group("kernels", "kernel$")], r"In no parameter group: blocks/0/conv1/bias, .* and 1 more.*'kernels' has patterns"),
    ([group("all", "."), group("head", "^fc/")], r"In several .* groups: fc/bias \(all, head\), fc/kernel \(all, head\)"),
    ([group("all", "."), group("none", "^head/")], r"Pattern '\^head/' of parameter group 'none' is found in no"),
    ([group("all", ".", but_not=("^head/",))], r"Pattern '\^head/' of parameter group 'all' is found in no"),
    ([group("fc", "^fc/"), group("fc", ".", but_not=("^fc/",))], r"expected a name of its own for each, got \['fc', 'fc'\]"),
  ],
)
def test_groups_that_do_not_part_the_parameters(groups, message):
  with pytest.raises(ValueError, match=message):
    optim.parameter_groups(make_params(), groups)
  with pytest.raises(ValueError, match=message):
    make(OptimConfig(), make_params(), groups=groups)


def test_unknown_leaf_is_an_error():
  with pytest.raises(ValueError, match="In no parameter group: fc/wight"):
    make(OptimConfig(), {"fc": {"wight": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}})


def test_a_group_may_not_clip_what_the_model_marks():
  with pytest.raises(ValueError, match="Marked agc=False by the model, but in a group that clips: fc/kernel"):
    optim.parameter_groups(make_state(make_params()), [group("all", ".")])


def test_exclusion_that_finds_nothing_is_an_error():
  with pytest.raises(ValueError, match="agc_exclude: pattern 'head/kernel' is found in none of the 13 parameter paths"):
    make(OptimConfig(agc_exclude=("head/kernel",)), make_params())


def test_own_groups_decide_decay_and_clipping():
  params = make_params()
  groups = [group("all", ".", but_not=("^stem/",)), group("stem", "^stem/", decay=False, clip=False)]
  config = OptimConfig(weight_decay=0.5, momentum=0.0, schedule="constant", warmup_epochs=0, clipping=1e-6)
  got, _ = run(make(config, params, groups=groups), params, steps=1)
  want = jax.tree.map(lambda param: param - 0.2 * 0.5 * param, params)
  want["stem"] = jax.tree.map(lambda param, grad: param - 0.2 * grad, params["stem"], make_grads(0)["stem"])
  assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_description():
  table = optim.describe_groups(make_state(make_params()), OptimConfig()).splitlines()
  assert table[0].split() == "group patterns tensors parameters weight decay AGC clipping".split()
  assert [line.split()[-4:] for line in table[1:4]] == [
    ["3", "536", "2e-05", "0.01"],
    ["1", "40", "2e-05", "off"],
    ["9", "44", "0", "0.01"],
  ]
  assert table[2].startswith("kernels, unclipped") and "^fc/kernel$" in table[2]
  assert table[-1].split() == ["all", "13", "620"]
  off = optim.describe_groups(make_params(), OptimConfig(clipping=math.inf)).splitlines()
  assert all(line.split()[-1] == "off" for line in off[1:-1])
