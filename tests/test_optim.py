"""Optimizer, schedule, parameter groups and average against float64 numpy references, optax and the published code."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from nfnets import models, optim
from nfnets.agc import agc, agc_metrics, named_leaves
from nfnets.config import OptimConfig
from tests import golden as golden_values

LENGTH = {"batch": 512, "steps_per_epoch": 2.5, "total_steps": 20}
SHAPES = {
  "stem/kernel": (3, 3, 3, 8),
  "stem/gain": (8,),
  "stem/bias": (8,),
  "blocks/0/conv1/kernel": (3, 3, 4, 8),
  "blocks/0/conv1/gain": (8,),
  "blocks/0/conv1/bias": (8,),
  "blocks/0/se/fc0/kernel": (8, 4),
  "blocks/0/se/fc0/bias": (4,),
  "blocks/0/skip_gain": (),
  "blocks/1/bias1a": (),
  "blocks/1/scale": (),
  "fc/kernel": (8, 5),
  "fc/bias": (5,),
}
CLASSIFIER = ("^fc/kernel$",)


def nest(flat):
  tree = {}
  for path, value in flat.items():
    *parents, leaf = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree


def flatten(tree, convert=np.asarray):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): convert(leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


def random_flat(seed, scale=1.0):
  draw = np.random.default_rng(seed)
  return {path: np.asarray(draw.normal(scale=scale, size=shape), np.float32) for path, shape in SHAPES.items()}


def make_params(seed=0, scale=0.3):
  flat = random_flat(seed, scale)
  flat["blocks/0/skip_gain"] = np.float32(0)  # As initialised: AGC's eps must let it move.
  return jax.tree.map(jnp.asarray, nest(flat))


def make_grads(step):
  # Scales around the clipping threshold, so that some units are clipped and some are not.
  return jax.tree.map(jnp.asarray, nest(random_flat(100 + step, scale=0.006 * (step + 1))))


def make_state(params):
  """The same parameters as an nnx.State in which the classifier's kernel carries the model's mark."""
  leaves = {
    path: nnx.Param(jnp.asarray(value), **({"agc": False} if path == "fc/kernel" else {}))
    for path, value in flatten(params).items()
  }
  return nnx.State(nest(leaves))


def config_with(**fields):
  return OptimConfig(**{"agc_exclude": CLASSIFIER, "warmup_epochs": 1.0, **fields})


def run(optimizer, params, steps=4, wrap=lambda tree: tree, update=None):
  update = update or jax.jit(optimizer.update)
  state = optimizer.init(params)
  for step in range(steps):
    updates, state = update(wrap(make_grads(step)), state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def assert_close(got, want, rtol=2e-6, atol=1e-7):
  got, want = flatten(got), flatten(want)
  assert got.keys() == want.keys()
  for path in want:
    np.testing.assert_allclose(got[path], want[path], rtol=rtol, atol=atol, err_msg=path)


def make(config, params, **kwargs):
  return optim.make_optimizer(config, params, **LENGTH, **kwargs)


# --- One training step -----------------------------------------------------------------------------------------------


def reference_lr(config, step, batch, steps_per_epoch, total_steps):
  peak = config.base_lr * batch / 256 if config.scale_lr else config.base_lr
  warmup = config.warmup_epochs * steps_per_epoch
  if step <= warmup and warmup > 0:
    return peak * step / warmup
  progress = min((step - warmup) / (total_steps - warmup), 1)
  return config.end_lr + (peak - config.end_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def reference_clip(grad, param, config):
  axes = None if param.ndim <= 1 else tuple(range(param.ndim - 1))
  norm = lambda x: np.sqrt((x**2).sum(axis=axes, keepdims=axes is not None))
  limit = config.clipping * np.maximum(norm(param), config.agc_eps)
  return np.where(norm(grad) > limit, grad * limit / np.maximum(norm(grad), 1e-6), grad)


def reference_run(config, params, steps):
  """AGC, coupled decay, momentum, learning rate and average in float64."""
  params = {path: value.astype(np.float64) for path, value in flatten(params).items()}
  momentum = {path: np.zeros_like(value) for path, value in params.items()}
  ema = dict(params)
  for step in range(steps):
    grads = {path: value.astype(np.float64) for path, value in flatten(make_grads(step)).items()}
    for path, grad in grads.items():
      if config.clipping is not None and path != "fc/kernel":
        grad = reference_clip(grad, params[path], config)
      if path.endswith("/kernel"):
        grad = grad + config.weight_decay * params[path]
      momentum[path] = config.momentum * momentum[path] + grad
      direction = momentum[path] if config.nesterov is False else grad + config.momentum * momentum[path]
      params[path] = params[path] - reference_lr(config, step, **LENGTH) * direction
      decay = min(config.ema_decay, (1 + step) / (10 + step))
      ema[path] = decay * ema[path] + (1 - decay) * params[path]
  return params, ema


@pytest.mark.parametrize(
  ("kind", "fields"),
  [
    ("dict", {}),
    ("state", {}),
    ("dict", {"nesterov": False}),
    ("dict", {"momentum": 0.0, "ema_decay": 0.3}),
    ("dict", {"clipping": None, "weight_decay": 0.1}),
    ("state", {"weight_decay": 0.1}),
  ],
  ids=str,
)
def test_sgd_and_average_equal_float64_reference(kind, fields):
  config = config_with(**fields)
  params, wrap = make_params(), lambda tree: tree
  if kind == "state":
    params, wrap = make_state(params), make_state
    config.agc_exclude = ()  # The mark alone must do.
  optimizer = make(config, params)

  @jax.jit
  def step(params, ema, state, grads, count):
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return params, optim.ema_update(ema, params, count, config.ema_decay), state

  got, ema, state = params, params, optimizer.init(params)
  for count in range(6):
    got, ema, state = step(got, ema, state, wrap(make_grads(count)), count)
  want, want_ema = reference_run(config, make_params(), 6)
  plain = lambda tree: nest({path.removesuffix("/value"): leaf for path, leaf in flatten(tree).items()})
  assert_close(plain(got), nest(want))
  assert_close(plain(ema), nest(want_ema))
  assert np.any(flatten(plain(got))["blocks/0/skip_gain"] != 0)
  assert ("momentum" in state) == (config.momentum > 0) and ("agc" in state) == (config.clipping is not None)


def test_plain_sgd_is_gradient_times_rate():
  config = OptimConfig(momentum=0.0, clipping=None, weight_decay=0.0, schedule="constant", warmup_epochs=0)
  got, _ = run(make(config, make_params()), make_params(), steps=1)
  assert_close(got, jax.tree.map(lambda p, g: p - 0.2 * g, make_params(), make_grads(0)))


def decay_mask(tree):
  return nest({path: path.endswith("/kernel") for path in flatten(tree, convert=id)})


def test_adamw_equals_optax():
  config = OptimConfig(name="adamw", base_lr=0.01, weight_decay=0.05, b1=0.8, b2=0.95, eps=1e-6, clipping=None)
  config.warmup_epochs = 1.0
  schedule = optim.make_schedule(config, **LENGTH)
  reference = optax.adamw(schedule, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.05, mask=decay_mask)
  assert_close(run(make(config, make_params()), make_params())[0], run(reference, make_params())[0])


@pytest.mark.parametrize("nesterov", [None, False, True])
def test_lars_equals_optax(nesterov):
  config = OptimConfig(name="lars", base_lr=2.0, weight_decay=0.01, nesterov=nesterov, clipping=None, warmup_epochs=1.0)
  schedule = optim.make_schedule(config, **LENGTH)
  reference = optax.lars(schedule, 0.01, decay_mask, trust_ratio_mask=decay_mask, nesterov=bool(nesterov))
  assert_close(run(make(config, make_params()), make_params())[0], run(reference, make_params())[0])


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_agc_comes_first_with_every_optimizer(name):
  config = config_with(name=name)
  params = make_params()
  clipped = lambda grads, state, params: make(dataclasses.replace(config, clipping=None), params).update(
    nest(
      {
        path: grad if path == "fc/kernel" else reference_clip(grad, flatten(params)[path], config).astype(np.float32)
        for path, grad in flatten(grads).items()
      }
    ),
    state,
    params,
  )
  without = make(dataclasses.replace(config, clipping=None), params)
  assert_close(run(make(config, params), params)[0], run(without, params, update=clipped)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_sharded_and_jitted_equal_eager(name):
  params = make_params()
  optimizer = make(config_with(name=name), params)
  want, _ = run(optimizer, params, steps=2, update=optimizer.update)
  count = max(n for n in (1, 2, 4, 8) if n <= jax.device_count())
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("data",))

  def place(tree):
    def put(x):
      whole = x.ndim == 0 or x.shape[-1] % count
      spec = PartitionSpec() if whole else PartitionSpec(*[None] * (x.ndim - 1), "data")
      return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)

  got, _ = run(optimizer, place(params), steps=2, wrap=place)
  assert_close(got, want)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_low_precision_gradients_keep_a_float32_state(name):
  params = make_params()
  half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
  optimizer = make(config_with(name=name), params)
  got, state = run(optimizer, params, steps=2, wrap=half)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((got, state)) if jnp.issubdtype(x.dtype, jnp.floating))
  assert_close(got, run(optimizer, params, steps=2)[0], rtol=0.05, atol=0.05)


def test_works_inside_multi_steps():
  params = make_params()
  config = config_with(clipping=None)
  accumulated = optax.MultiSteps(make(config, params), every_k_schedule=2)
  state = accumulated.init(params)
  for _ in range(2):
    updates, state = accumulated.update(make_grads(0), state, params)
  once, _ = make(config, params).update(make_grads(0), make(config, params).init(params), params)
  assert_close(updates, once)


def test_clipping_is_tracked_under_its_name():
  params = make_state(make_params())
  _, state = run(make(OptimConfig(agc_track=True, warmup_epochs=1), params), params, steps=1, wrap=make_state)
  metrics = agc_metrics(state["agc"])
  assert metrics.keys() == SHAPES.keys() - {"fc/kernel"} and metrics["blocks/0/skip_gain"]["clip_fraction"] == 1


def test_parameters_other_than_it_was_made_for_are_an_error():
  params = make_params()
  optimizer = make(config_with(clipping=None), params)
  with pytest.raises(ValueError, match="made for other parameters; it does not know head/kernel"):
    optimizer.init({**params, "head": {"kernel": jnp.zeros((2, 2))}})


def test_optimizer_needs_shapes_only():
  params = make_params()
  abstract = jax.eval_shape(lambda: params)
  assert_close(run(make(config_with(), abstract), params)[0], run(make(config_with(), params), params)[0])


# --- The published optimizer ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
  return golden_values.load("optimizer")


def unpack(golden, vector):
  """A vector of tests/golden/optimizer.npz as nested dicts."""
  tree, start = {}, 0
  for path, shape in zip(str(golden["paths"]).split("\n"), str(golden["shapes"]).split("\n"), strict=True):
    shape = tuple(map(int, shape.split("x"))) if shape else ()
    tree[path] = jnp.asarray(vector[start : start + math.prod(shape)].reshape(shape), jnp.float32)
    start += math.prod(shape)
  assert start == vector.size
  return nest(tree)


def test_official_step(golden):
  """Learning rate, parameters and average after every step equal the published optimizer's on the same gradients."""
  config = OptimConfig(base_lr=float(golden["base_lr"]), warmup_epochs=float(golden["warmup_steps"]), agc_exclude=CLASSIFIER)
  length = {"batch": int(golden["batch"]), "steps_per_epoch": 1, "total_steps": int(golden["total_steps"])}
  params = ema = unpack(golden, golden["initial"])
  optimizer, schedule = optim.make_optimizer(config, params, **length), optim.make_schedule(config, **length)

  @jax.jit
  def train_step(params, ema, state, grads, step):
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return params, optim.ema_update(ema, params, step, config.ema_decay), state

  state = optimizer.init(params)
  for step, gradient in enumerate(golden["gradients"]):
    np.testing.assert_allclose(schedule(step), golden["lr"][step], rtol=1e-6)
    params, ema, state = train_step(params, ema, state, unpack(golden, gradient), step)
    assert_close(params, unpack(golden, golden["params"][step]), rtol=1e-6, atol=1e-6)
    assert_close(ema, unpack(golden, golden["ema"][step]), rtol=1e-6, atol=1e-6)


def test_official_clipping():
  """The published AGC's clipped gradients, on a tree of every kind of parameter."""
  golden = golden_values.load("agc")
  params = unpack(golden, golden["params"])
  clip = agc(float(golden["clipping"]), eps=float(golden["eps"]), exclude=CLASSIFIER)
  update = jax.jit(lambda gradient: clip.update(gradient, clip.init(params), params)[0])
  for gradient, clipped in zip(golden["gradients"], golden["clipped"], strict=True):
    assert not np.array_equal(gradient, clipped)
    assert_close(update(unpack(golden, gradient)), unpack(golden, clipped), rtol=1e-6, atol=1e-9)


def test_official_schedule_at_release_scale(golden):
  images, batch = 1281167, 4096
  schedule = optim.make_schedule(OptimConfig(), batch=batch, steps_per_epoch=images / batch, total_steps=images * 360 // batch)
  got = [schedule(int(step)) for step in golden["release_steps"]]
  np.testing.assert_allclose(got, golden["release_lr"], rtol=1e-6, atol=1e-12)


# --- Average ---------------------------------------------------------------------------------------------------------


def test_ema_decay_warms_up():
  for step, decay in ((0, 0.1), (1, 2 / 11), (8, 0.5), (90, 0.91), (10**7, 0.99999)):
    got = optim.ema_update({"w": jnp.zeros(())}, {"w": jnp.ones(())}, step, 0.99999)["w"]
    np.testing.assert_allclose(got, 1 - decay, rtol=1e-6)
    assert got.dtype == jnp.float32


def test_ema_of_equal_values_does_not_drift():
  value = {"w": jnp.float32(math.pi)}
  assert jax.jit(optim.ema_update, static_argnums=3)(value, value, 10**6, 0.99999)["w"] == value["w"]


def test_ema_of_low_precision_parameters_is_float32():
  got = optim.ema_update({"w": jnp.zeros(3)}, {"w": jnp.ones(3, jnp.bfloat16)}, 0, 0.5)["w"]
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, 0.9, rtol=1e-6)


# --- Schedule --------------------------------------------------------------------------------------------------------


def test_schedule_of_the_nfnet_recipe():
  # 360 epochs of ImageNet at batch 4096: peak 1.6, after a warm-up of a fractional number of steps.
  length = {"batch": 4096, "steps_per_epoch": 1281167 / 4096, "total_steps": 1281167 * 360 // 4096}
  config = OptimConfig()
  schedule = jax.jit(optim.make_schedule(config, **length))
  total, warmup = length["total_steps"], 5 * length["steps_per_epoch"]
  steps = np.unique([*range(0, total, 37), math.floor(warmup), math.ceil(warmup), total - 1, total, total + 100])
  got = np.array([schedule(step) for step in steps])
  want = np.array([reference_lr(config, step, **length) for step in steps])
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-12)
  assert got.dtype == np.float32 and got[0] == 0 and abs(got.max() - 1.6) < 1e-4 and schedule(total) == 0


def test_schedule_of_the_nf_regnet_recipe():
  config = OptimConfig(base_lr=0.4, scale_lr=False, end_lr=0.001)
  length = {"batch": 1024, "steps_per_epoch": 100, "total_steps": 36000}
  schedule = optim.make_schedule(config, **length)
  for step, value in ((0, 0.0), (100, 0.08), (500, 0.4), (18250, 0.2005), (36000, 0.001), (40000, 0.001)):
    np.testing.assert_allclose(schedule(step), value, rtol=1e-6)
  np.testing.assert_allclose(schedule(7777), reference_lr(config, 7777, **length), rtol=1e-6)


def test_schedule_without_warmup_and_constant():
  schedule = optim.make_schedule(OptimConfig(warmup_epochs=0), **LENGTH)
  assert schedule(0) == jnp.float32(0.2) and schedule(20) == 0
  schedule = optim.make_schedule(OptimConfig(schedule="constant", warmup_epochs=2), **LENGTH)
  got = [schedule(step) for step in (0, 1, 5, 6, 19, 1000)]
  np.testing.assert_allclose(got, [0, 0.04, 0.2, 0.2, 0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
  ("fields", "length", "message"),
  [
    ({"warmup_epochs": 8}, {}, r"warm-up of 8 epochs \(20 steps\) does not end within the training of 20 steps"),
    ({"end_lr": 0.3}, {}, "end_lr = 0.3 is above the peak learning rate 0.2"),
    ({}, {"batch": 0}, "batch = 0"),
    ({}, {"steps_per_epoch": 0}, "steps_per_epoch = 0"),
    ({}, {"total_steps": 0}, "total_steps = 0"),
  ],
)
def test_schedules_that_do_not_fit(fields, length, message):
  with pytest.raises(ValueError, match=message):
    optim.make_schedule(OptimConfig(**fields), **{**LENGTH, **length})


# --- Parameter groups ------------------------------------------------------------------------------------------------


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
    ([group("one", "^fc/"), group("one", ".", but_not=("^fc/",))], "names of their own"),
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
  for path, value in flatten(got).items():
    old, grad = flatten(params)[path], flatten(make_grads(0))[path]
    want = old - 0.2 * grad if path.startswith("stem/") else old - 0.2 * 0.5 * old
    np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-5, err_msg=path)


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


# --- Config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"name": "SGD"}, "OptimConfig.name = 'SGD': expected one of 'sgd', 'adamw', 'lars'. Did you mean 'sgd'?"),
    ({"name": "adam"}, "Did you mean 'adamw'?"),
    ({"schedule": "cosin"}, "schedule = 'cosin': expected one of 'cosine', 'constant'. Did you mean 'cosine'?"),
    ({"base_lr": 0.0}, "OptimConfig.base_lr = 0.0: expected a finite number > 0"),
    ({"base_lr": "0.1"}, "OptimConfig.base_lr = '0.1': expected a finite number > 0"),
    ({"end_lr": -1.0}, "OptimConfig.end_lr = -1.0"),
    ({"warmup_epochs": math.nan}, "OptimConfig.warmup_epochs = nan"),
    ({"momentum": 1.0}, "OptimConfig.momentum = 1.0: expected a number in [0, 1)"),
    ({"weight_decay": math.inf}, "OptimConfig.weight_decay = inf"),
    ({"clipping": 0.0}, "OptimConfig.clipping = 0.0: expected a number > 0, or None (or inf) for no clipping"),
    ({"clipping": True}, "OptimConfig.clipping = True"),
    ({"agc_eps": 0}, "OptimConfig.agc_eps = 0"),
    ({"agc_exclude": "fc"}, "OptimConfig.agc_exclude = 'fc': expected a tuple of regular expressions"),
    ({"agc_exclude": ("(",)}, "OptimConfig.agc_exclude = ('(',): expected regular expressions, of which '(' is none"),
    ({"agc_track": 1}, "OptimConfig.agc_track = 1: expected True or False"),
    ({"nesterov": "yes"}, "OptimConfig.nesterov = 'yes': expected True, False or None"),
    ({"ema_decay": 1.0}, "OptimConfig.ema_decay = 1.0: expected a number in [0, 1), or None for no average"),
    ({"b1": 0.5}, "OptimConfig.b1 = 0.5 has no effect: only adamw read it, and name is 'sgd'"),
    ({"name": "adamw", "momentum": 0.5}, "OptimConfig.momentum = 0.5 has no effect"),
    ({"schedule": "constant", "end_lr": 0.01}, "OptimConfig.end_lr = 0.01 has no effect with schedule 'constant'"),
    ({"nesterov": True, "momentum": 0.0}, "OptimConfig.nesterov = True needs momentum > 0"),
  ],
)
def test_bad_fields(fields, message):
  with pytest.raises(ValueError) as error:
    OptimConfig(**fields)
  assert message in str(error.value)


def test_fields_are_checked_again_when_read():
  config = OptimConfig()
  with pytest.raises(AttributeError):
    config.weight_decoy = 0.1
  config.momentum = 2.0
  for read in (make, lambda config, _: optim.make_schedule(config, **LENGTH)):
    with pytest.raises(ValueError, match=r"OptimConfig.momentum = 2.0: expected a number in \[0, 1\)"):
      read(config, make_params())
  with pytest.raises(ValueError, match="OptimConfig.momentum = 2.0"):
    optim.describe_groups(make_params(), config)
