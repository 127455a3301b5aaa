"""The step is the same however devices share the work: with the state copied or split, a batch in parts, or a user's own loop."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from nfnets import optim
from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.errors import UserError
from nfnets.models import layers
from nfnets.train.step import sharding
from nfnets.train.step.gradients import local_gradients, row_keys, step_key
from nfnets.train.step.state import build_network, init_state, split_network
from nfnets.train.step.step import make_train_step, train_step_over

STEPS = 20
TINY = {
  "width": (16, 32),
  "group_width": 8,
  "stem_width": (4, 4, 8),
  "depth": (1, 1),
  "stem_strides": (1, 1, 1, 2),
  "stage_strides": (1, 2),
}  # two blocks: compiling takes most of the time
SMALL = {"width": (16, 32), "depth": (1, 1), "stage_strides": (1, 2)}  # of a ResNet, which has half as many layers


def make_config(**changes) -> Config:
  """Makes a run with AGC, Nesterov, EMA, dropout and stochastic depth."""
  config = Config(
    model=ModelConfig(name="nfnet_tiny", drop_rate=0.2, stochastic_depth=0.2, overrides=dict(TINY)),
    data=DataConfig(name="digits"),
    batch=32,
    epochs=2,
    optim=OptimConfig(base_lr=0.8, warmup_epochs=0.1, clipping=0.05, agc_track=True, ema_decay=0.9),
  )
  return dataclasses.replace(config, **changes)


def batch_of(step: int, rows: int = 32) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(step)
  label = rng.integers(0, 10, rows).astype(np.int32)
  image = rng.integers(0, 60, (rows, 8, 8, 3)) + 20 * label[:, None, None, None]
  return {"image": image.astype(np.uint8), "label": label}


NETWORKS = {}  # by the model's configuration: each is made once


def prepare(config: Config):
  name = repr(config.model)
  if name not in NETWORKS:
    NETWORKS[name] = split_network(build_network(config.model, 10))
  graph, params, stats = NETWORKS[name]
  optimizer = optim.make_optimizer(config.optim, params, batch=config.batch, steps_per_epoch=20, total_steps=40)
  return graph, optimizer, init_state(params, stats, optimizer, config)


def messages_of(devices: int, stop: bool = False) -> dict[str, np.ndarray]:
  """Makes what the processes tell each other beside a batch; `stop`: whether the last device's process was asked to stop."""
  return {"stop": np.arange(1, devices + 1, dtype=np.int32) // devices * stop, "corrupt": np.arange(devices, dtype=np.int32)}


def train(config: Config, devices: int, count: int = STEPS):
  """Returns (losses, state, the compiled step) after `count` steps on so many devices."""
  mesh = sharding.make_mesh(jax.devices()[:devices])
  graph, optimizer, state = prepare(config)
  like = sharding.place(mesh, state, shard=config.shard)
  state, losses = sharding.put(state, like), []
  step = train_step_over(config, mesh, graph, optimizer, like)
  for i in range(count):
    state, metrics = step(state, sharding.put_batch(mesh, {**batch_of(i), **messages_of(devices, stop=i == 1)}))
    assert int(metrics["stop"]) == (i == 1) and metrics["corrupt"].tolist() == [*range(devices)]
    losses.append(float(metrics["loss_sum"]) / float(metrics["count"]))
  assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, like)
  return losses, state, step


def same(a, b, tolerance: float = 1e-5) -> None:
  """Asserts that two trees differ by at most `tolerance`, relative or absolute."""
  chex.assert_trees_all_close(*jax.device_get((a, b)), rtol=tolerance, atol=tolerance)


def furthest(a, b) -> float:
  """Returns the largest absolute difference between two trees."""
  return max(float(np.max(np.abs(x - y))) for x, y in zip(*map(jax.tree.leaves, jax.device_get((a, b))), strict=True))


@pytest.fixture(scope="module")
def one_device():
  """The reference; it alone looks for bad steps too, and finds none: their test takes the step that is compiled here."""
  return train(make_config(on_bad_step="skip", spike=3.0), 1)


def test_the_reference_learns(one_device):
  losses, state, _ = one_device
  assert int(state.bad_steps) == 0
  assert np.mean(losses[-3:]) < 0.9 * losses[0] and int(state.step) == STEPS and not state.halted


@pytest.mark.parametrize("devices, shard, accumulate", [(2, True, 1), (8, False, 2)])
def test_shared_work_is_the_same_work(one_device, devices, shard, accumulate):
  """Compares losses, parameters, momentum, AGC's statistics and averages after 20 steps."""
  losses, state, _ = train(make_config(shard=shard, accumulate=accumulate), devices)
  np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
  same((state.params, state.ema), (one_device[1].params, one_device[1].ema))
  same(state.opt_state, one_device[1].opt_state, 1e-4)  # among it are AGC's largest ratios, which are 40 and more


@pytest.mark.parametrize("wrap", ["pmap", "shard_map"])
def test_a_loop_of_ones_own(one_device, wrap):
  """Runs the pure step inside a user's jax.pmap or jax.shard_map, where each device has its part of the batch."""
  config, devices = make_config(), jax.devices()[:2]
  graph, optimizer, state = prepare(config)
  core = make_train_step(config, graph, optimizer, axis="replicas")
  if wrap == "pmap":
    step = jax.pmap(core, axis_name="replicas", devices=devices)
    state = jax.tree.map(lambda x: np.stack([x, x]), state)
    divide, first = (lambda batch: {name: x.reshape(2, -1, *x.shape[1:]) for name, x in batch.items()}), lambda x: x[0]
  else:
    mesh = jax.make_mesh((2,), ("replicas",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    whole, rows = PartitionSpec(), PartitionSpec("replicas")
    state = jax.device_put(state, NamedSharding(mesh, whole))  # where the step's results lie: else it would be compiled twice
    step = jax.jit(jax.shard_map(core, mesh=mesh, in_specs=(whole, rows), out_specs=whole, check_vma=False))
    divide = first = lambda x: x
  losses = []
  for i in range(STEPS):
    state, metrics = step(state, divide(batch_of(i)))
    losses.append(float(first(metrics["loss_sum"])) / float(first(metrics["count"])))
  np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
  same(jax.tree.map(first, (state.params, state.ema)), (one_device[1].params, one_device[1].ema))


def occurrences(jaxpr, primitive):
  """How often a primitive stands in a jaxpr and in those within it, each as often as it is called."""
  count = 0
  for eqn in jaxpr.eqns:
    count += eqn.primitive.name == primitive
    for value in eqn.params.values():
      within = [getattr(inner, "jaxpr", inner) for inner in (value if isinstance(value, tuple | list) else (value,))]
      count += sum(occurrences(inner, primitive) for inner in within if hasattr(inner, "eqns"))
  return count


def test_weights_are_standardized_once_however_many_parts():
  """Counts in the traced program, where each convolution's standardization has exactly one rsqrt."""
  counts = []
  for accumulate in (1, 4):
    config = make_config(accumulate=accumulate)
    graph, optimizer, state = prepare(config)
    program = jax.make_jaxpr(make_train_step(config, graph, optimizer))(state, batch_of(0))
    convolutions = sum(
      path[-1] == "gain"
      for path, _ in jax.tree_util.tree_flatten_with_path(state.params.to_pure_dict())[0]
      for path in [[str(getattr(part, "key", part)) for part in path]]
    )
    counts.append(occurrences(program.jaxpr, "rsqrt"))
    assert convolutions > 10 and counts[-1] == convolutions
  assert counts[0] == counts[1]


def test_statistics_of_each_device():
  """batch_stats="device": the gradient is the mean of what each half of the batch gives, and so are the statistics."""
  config = make_config(model=ModelConfig(name="resnet_tiny", overrides=SMALL), batch_stats="device")
  config.optim = dataclasses.replace(config.optim, warmup_epochs=0)  # with a warm-up the first learning rate would be 0
  graph, optimizer, state = prepare(config)
  mesh, batch = sharding.make_mesh(jax.devices()[:2]), batch_of(0)
  like = sharding.place(mesh, state)
  after, _ = train_step_over(config, mesh, graph, optimizer, like)(sharding.put(state, like), sharding.put_batch(mesh, batch))
  gradients = jax.jit(functools.partial(local_gradients, config, graph))
  batch["key"] = row_keys(step_key(config, 0), 32)
  halves = [
    gradients(state.params, state.stats, jax.tree.map(lambda x, part=part: x[part], batch))
    for part in (slice(0, 16), slice(16, 32))
  ]

  @jax.jit
  def update(a, b):
    grads, _, stats, _ = jax.tree.map(lambda a, b: (a + b) / 2, a, b)
    updates, _ = optimizer.update(grads, state.opt_state, state.params)
    return jax.tree.map(jnp.add, state.params, updates), stats

  expected = update(*halves)
  chex.assert_trees_all_close(jax.device_get((after.params, after.stats)), jax.device_get(expected), rtol=0, atol=1e-5)
  other = train_step_over(dataclasses.replace(config, batch_stats="global"), mesh, graph, optimizer, like)(
    sharding.put(state, like), sharding.put_batch(mesh, batch_of(0))
  )[0]
  assert furthest(after.stats, other.stats) > 1e-4 and furthest(after.params, other.params) > 1e-4


def test_sharpness_aware_steps_refuse_statistics_of_the_global_batch():
  config = make_config(model=ModelConfig(name="resnet_tiny"))
  config.optim = dataclasses.replace(config.optim, sam_rho=0.1)
  with pytest.raises(ValueError, match="config.batch_stats='global' with config.optim.sam_rho: .* expected"):
    train(config, 2, count=0)


def test_a_loop_of_ones_own_refuses_batchnorm_over_the_global_batch():
  """Each device of a pmap has only its own images, so that no batch statistics are global."""
  config = make_config(model=ModelConfig(name="resnet_tiny", overrides=SMALL))
  graph, optimizer, state = prepare(config)
  step = make_train_step(config, graph, optimizer, axis="replicas")
  with pytest.raises(UserError, match="config.batch_stats='global' with axis='replicas'"):
    jax.eval_shape(lambda state, batch: jax.vmap(step, in_axes=(None, 0), axis_name="replicas")(state, batch), state, stacked(2))


def stacked(devices: int) -> dict[str, np.ndarray]:
  return {name: rows.reshape(devices, -1, *rows.shape[1:]) for name, rows in batch_of(0).items()}


def test_a_second_trace_of_a_compiled_step_is_an_error():
  config = make_config()
  graph, optimizer, state = prepare(config)
  mesh = sharding.make_mesh(jax.devices()[:1])
  like = sharding.place(mesh, state)
  step = train_step_over(config, mesh, graph, optimizer, like)
  shapes = {name: jax.ShapeDtypeStruct(rows.shape, rows.dtype) for name, rows in batch_of(0).items()}
  step.lower(like, shapes)
  train_step_over(config, mesh, graph, optimizer, like).lower(
    like, shapes
  )  # a second step is counted by itself, and may be traced too
  with pytest.raises(AssertionError, match="traced > 1 times"):
    step.lower(like, {name: jax.ShapeDtypeStruct((16, *x.shape[1:]), x.dtype) for name, x in shapes.items()})


def test_sharpness_aware_steps():
  """Does SAM by hand on two devices: each ascends alone on a quarter of its rows, and the gradients there are averaged."""
  plain = make_config(model=ModelConfig(name="nf_resnet_tiny", drop_rate=0.2, stochastic_depth=0.2, overrides=SMALL))
  plain.optim = dataclasses.replace(plain.optim, warmup_epochs=0)  # with a warm-up the first learning rate would be 0
  config = dataclasses.replace(plain, optim=dataclasses.replace(plain.optim, sam_rho=0.1, sam_share=0.25))
  graph, optimizer, state = prepare(config)
  mesh, batch = sharding.make_mesh(jax.devices()[:2]), batch_of(0)
  like = sharding.place(mesh, state)
  after, _ = train_step_over(config, mesh, graph, optimizer, like)(sharding.put(state, like), sharding.put_batch(mesh, batch))
  batch["key"] = row_keys(step_key(config, 0), 32)
  gradients = jax.jit(lambda params, batch: local_gradients(plain, graph, params, state.stats, batch)[0])
  descents, plain_descents = [], []
  for rows in (slice(0, 16), slice(16, 32)):
    mine = jax.tree.map(lambda x, rows=rows: x[rows], batch)
    first = {
      **jax.tree.map(lambda x: x[:4], mine),
      "key": layers.fold_in(mine["key"][:4], 1 << 31),
    }  # the ascent has dropout masks of its own
    ascent = gradients(state.params, first)
    norm = np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(jax.device_get(ascent))))
    descents.append(gradients(jax.tree.map(lambda p, g, norm=norm: p + 0.1 / norm * g, state.params, ascent), mine))
    plain_descents.append(gradients(state.params, mine))

  @jax.jit
  def update(a, b):
    updates, _ = optimizer.update(jax.tree.map(lambda a, b: (a + b) / 2, a, b), state.opt_state, state.params)
    return jax.tree.map(jnp.add, state.params, updates)

  expected, without = update(*descents), update(*plain_descents)
  chex.assert_trees_all_close(jax.device_get(after.params), jax.device_get(expected), rtol=0, atol=1e-5)
  assert furthest(after.params, without) > 1e-3 and furthest(after.params, state.params) > 1e-3


def test_bad_steps_are_left_out_and_counted(one_device):
  """Skips a step whose loss is eight times its running mean; test_step.py has the policy "stop"."""
  mesh, (_, _, step) = sharding.make_mesh(jax.devices()[:1]), one_device
  _, _, state = prepare(make_config(on_bad_step="skip", spike=3.0))

  def take_step(state, i):
    """A step of the same program, whose arguments do not outlive it; its results are copied."""
    placed = sharding.put(state, sharding.place(mesh, state))
    return jax.device_get(step(placed, sharding.put_batch(mesh, {**batch_of(i), **messages_of(1)})))

  for i in range(2):
    state, metrics = take_step(state, i)
    assert not metrics["bad"]
  before = state
  state, metrics = take_step(dataclasses.replace(state, loss_mean=state.loss_mean / 8), 2)
  assert metrics["bad"] and (int(state.bad_steps), int(state.step), bool(state.halted)) == (1, 3, False)
  same((state.params, state.opt_state, state.ema), (before.params, before.opt_state, before.ema), 0)
  state, metrics = take_step(dataclasses.replace(state, loss_mean=before.loss_mean), 3)
  assert not metrics["bad"] and (int(state.bad_steps), int(state.step)) == (1, 4)


def test_standardized_kernels_are_not_standardized_again():
  conv = layers.WSConv(3, 8, 3, rngs=layers.ParamKeys(jax.random.key(0)))
  expected = conv.weight()
  layers.standardize(conv)
  np.testing.assert_array_equal(conv.weight(), expected)
  again = nnx.merge(*nnx.split(conv))  # the mark is kept in the graph definition
  layers.standardize(again)
  np.testing.assert_array_equal(again.weight(), expected)
