"""The parameters' average, the learning-rate schedule, and how the fields of `OptimConfig` are checked."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets import optim
from nfnets.config import OptimConfig
from tests.optim_cases import LENGTH, make, make_params, reference_lr

# ---- average


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


# ---- schedule


def test_schedule_of_the_nfnet_recipe():
  # 360 epochs of ImageNet at batch 4096. The peak is 1.6, and the warm-up ends between two steps.
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


# ---- config


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"name": "SGD"}, "OptimConfig.name = 'SGD': expected one of 'sgd', 'adamw', 'lars'. Did you mean 'sgd'?"),
    ({"name": "adam"}, "Did you mean 'adamw'?"),
    ({"schedule": "cosin"}, "schedule = 'cosin': expected one of 'cosine', 'constant'. Did you mean 'cosine'?"),
    ({"base_lr": 0.0}, "OptimConfig.base_lr = 0.0: expected a number in (0, 1e4]"),
    ({"base_lr": "0.1"}, "OptimConfig.base_lr = '0.1': expected a number in (0, 1e4]"),
    ({"end_lr": -1.0}, "OptimConfig.end_lr = -1.0"),
    ({"warmup_epochs": math.nan}, "OptimConfig.warmup_epochs = nan"),
    ({"momentum": 1.0}, "OptimConfig.momentum = 1.0: expected a number in [0, 0.999999]"),
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
    with pytest.raises(ValueError, match=r"OptimConfig.momentum = 2.0: expected a number in \[0, 0.999999\]"):
      read(config, make_params())
  with pytest.raises(ValueError, match="OptimConfig.momentum = 2.0"):
    optim.describe_groups(make_params(), config)
