"""AGC's arithmetic, arguments and state, against a float64 reference of its own; test_agc_trees.py has trees and devices."""

import math

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nfnets
from nfnets.agc import AGCState, agc, agc_metrics, explain, explain_entries

SETTINGS = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)


def reference(grad, weight, unit_axes, clipping=0.01, eps=1e-3):
  """Clips in float64, unit by unit, in plain loops; returns the gradient, and [(norm before clipping, its bound)] by unit."""
  grad, weight = np.asarray(grad, np.float64), np.asarray(weight, np.float64)
  out, norms = grad.copy(), []
  for unit in np.ndindex(*(grad.shape[axis] for axis in unit_axes)):
    index = [slice(None)] * grad.ndim
    for axis, i in zip(unit_axes, unit, strict=True):
      index[axis] = i
    index = tuple(index)
    norm = math.sqrt(float((grad[index] ** 2).sum()))
    bound = clipping * max(math.sqrt(float((weight[index] ** 2).sum())), eps)
    if norm > bound:
      out[index] = grad[index] * (bound / max(norm, 1e-6))
    norms.append((norm, bound))
  return out, norms


def clip(grads, params, *args, **kwargs):
  tx = agc(*args, **kwargs)
  return tx.update(grads, tx.init(params), params)[0]


# Dense, Conv1D, Conv2D, grouped, depthwise, Conv3D, one input, one output. JAX compiles once for each shape, so they are few.
KERNELS = [(3, 5), (3, 2, 5), (3, 3, 4, 5), (3, 3, 2, 6), (3, 3, 1, 5), (2, 3, 2, 2, 5), (1, 5), (1, 1, 1, 5), (5, 1)]


@st.composite
def trees(draw):
  """Modules with kernels of rank 2 to 5 and vectors, and gradients from far below to far above the bound."""
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  params, grads = {}, {}
  for i in range(draw(st.integers(1, 4))):
    kernel = draw(st.sampled_from(KERNELS))
    shapes = {"kernel": kernel, "bias": kernel[-1:], "skip_gain": ()}
    scale = 10.0 ** draw(st.integers(-4, 1))
    params[f"m{i}"] = {name: np.float32(rng.normal(size=shape) * scale) for name, shape in shapes.items()}
    # Units differ by orders of magnitude, so that some are clipped and others not.
    magnitude = lambda shape: 10.0 ** rng.integers(-7, 3, shape[-1:])
    grads[f"m{i}"] = {name: np.float32(rng.normal(size=shape) * magnitude(shape)) for name, shape in shapes.items()}
  return params, grads


def by_unit(x, unit_axes):
  """[..., ...] → [units, elements of a unit]."""
  return np.moveaxis(x, unit_axes, range(len(unit_axes))).reshape(math.prod(x.shape[axis] for axis in unit_axes), -1)


@SETTINGS
@hypothesis.given(trees(), st.sampled_from([1e-3, 0.01, 0.5]), st.sampled_from([1e-3, 0.1]))
def test_random_trees_agree_with_the_reference(tree, clipping, eps):
  params, grads = tree
  out = clip(grads, params, clipping, eps)
  for module, leaves in params.items():
    for name, weight in leaves.items():
      axes = (weight.ndim - 1,) if name == "kernel" else ()
      want, norms_before = reference(grads[module][name], weight, axes, clipping, eps)
      got = np.asarray(out[module][name])
      np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-30)
      units = zip(by_unit(grads[module][name], axes), by_unit(got, axes), norms_before, strict=True)
      for unit_before, unit_after, (norm, bound) in units:
        assert np.linalg.norm(unit_after.astype(np.float64)) <= bound * (1 + 2e-6)
        if norm <= bound * (1 - 1e-6):  # below the threshold nothing changes, to the bit
          assert unit_before.tobytes() == unit_after.tobytes()


@SETTINGS
@hypothesis.given(trees())
def test_idempotent(tree):
  params, grads = tree
  once = clip(grads, params)
  twice = clip(once, params)
  chex.assert_trees_all_close(once, twice, rtol=1e-6)


@SETTINGS
@hypothesis.given(trees(), st.sampled_from([2.0**-3, 2.0, 2.0**7]))
def test_scale_covariance(tree, factor):
  """agc(c·g, c·w) = c·agc(g, w) where all norms are above eps; powers of two, so that no rounding differs."""
  params, grads = tree
  params = jax.tree.map(lambda w: np.sign(w) + w, params)  # every |entry| >= 1: all norms above eps, at any factor
  left = clip(jax.tree.map(lambda g: factor * g, grads), jax.tree.map(lambda w: factor * w, params), eps=1e-3)
  right = jax.tree.map(lambda g: factor * g, clip(grads, params, eps=1e-3))
  chex.assert_trees_all_close(left, right, rtol=1e-6, atol=1e-12)


def test_published_formula_by_hand():
  params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0]]), "bias": jnp.zeros(2)}
  grads = {"kernel": jnp.array([[1.0, 1.0], [0.0, 0.0]]), "bias": jnp.array([3e-6, 4e-6])}
  out = clip(grads, params, 0.01)
  # Unit 0 has ‖w‖ = 5 and the bound 0.05. Unit 1 has ‖w‖ = 0, so that eps gives the bound, 1e-5, which the bias, one unit with
  # ‖g‖ = 5e-6, stays below.
  np.testing.assert_allclose(out["kernel"], [[0.05, 1e-5], [0, 0]], rtol=1e-6)
  np.testing.assert_array_equal(out["bias"], grads["bias"])


def test_exactly_at_the_threshold_nothing_changes():
  params, grads = {"kernel": jnp.ones((4, 1))}, {"kernel": jnp.full((4, 1), 0.25)}
  np.testing.assert_array_equal(clip(grads, params, 0.25)["kernel"], grads["kernel"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("both", [False, True])
def test_low_precision_has_float32_norms(dtype, both):
  rng = np.random.default_rng(0)
  # Each unit has 4096 inputs: a bfloat16 sum of ones would stay at 256 for ever.
  weight = jnp.asarray(rng.normal(size=(4096, 8)), dtype if both else jnp.float32)
  grad = jnp.asarray(rng.normal(size=(4096, 8)) * np.logspace(-3, 0, 8), dtype)
  out = clip({"kernel": grad}, {"kernel": weight}, 0.02)["kernel"]
  want, _ = reference(grad.astype(jnp.float32), weight.astype(jnp.float32), (1,), 0.02)
  assert out.dtype == dtype
  # The reference is rounded once, to the gradient's dtype, and then must be equal.
  np.testing.assert_array_equal(out, jnp.asarray(want, jnp.float32).astype(dtype))


def test_float16_norms_do_not_overflow():
  grad, weight = jnp.full((64, 1), 6e4, jnp.float16), jnp.ones((64, 1), jnp.float16)
  out = clip({"kernel": grad}, {"kernel": weight}, 0.5)["kernel"]
  np.testing.assert_allclose(out, np.full((64, 1), 0.5), rtol=1e-3)


def test_units_whose_squares_overflow_become_zero_and_all_others_are_clipped():
  grad = jnp.ones((4, 3)) * jnp.array([1.0, 1e18, 1e30])
  out = clip({"kernel": grad}, {"kernel": jnp.ones((4, 3))}, 0.25)["kernel"]
  np.testing.assert_allclose(out, np.broadcast_to([0.25, 0.25, 0.0], (4, 3)), rtol=1e-6)


def test_weights_whose_squares_overflow_still_bound_their_gradients():
  out = clip({"kernel": jnp.full((1, 1), 1e19)}, {"kernel": jnp.full((1, 1), 1e30)}, 0.25)["kernel"]
  np.testing.assert_allclose(out, 0.25 * math.sqrt(np.finfo(np.float32).max), rtol=1e-6)


def test_float64_stays_float64():
  with jax.enable_x64(True):
    grad, weight = jnp.full((2, 1), 1.0, jnp.float64), jnp.full((2, 1), 1.0, jnp.float64)
    out = clip({"kernel": grad}, {"kernel": weight}, 0.01)["kernel"]
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, 0.01, rtol=1e-14)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_units_stay_visible_and_are_counted(bad):
  params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
  grads = {"kernel": jnp.ones((3, 4)).at[1, 2].set(bad), "bias": jnp.full(4, 1e-9)}
  tx = agc(0.01, track=True)
  out, state = jax.jit(tx.update)(grads, tx.init(params), params)
  unit = [1.0, np.nan, 1.0] if np.isnan(bad) else [0.0, np.nan, 0.0]
  np.testing.assert_array_equal(out["kernel"][:, 2], unit)
  np.testing.assert_allclose(np.delete(out["kernel"], 2, axis=1), 0.01, rtol=1e-6)
  metrics = agc_metrics(state)
  assert int(metrics["kernel"]["nonfinite_units"]) == 1
  assert int(metrics["bias"]["nonfinite_units"]) == 0
  assert float(metrics["kernel"]["clip_fraction"]) == 0.75
  np.testing.assert_allclose(metrics["kernel"]["max_ratio"], 1.0)


def test_track_counts_units_and_ratios():
  params = {"a": {"kernel": jnp.ones((4, 5))}, "b": {"kernel": jnp.zeros((4, 2))}, "n": jnp.arange(3)}
  grads = {"a": {"kernel": jnp.ones((4, 5)) * jnp.array([1, 2, 3, 1e-3, 1e-4])}, "b": {"kernel": jnp.zeros((4, 2))}}
  grads["n"] = jnp.arange(3)
  tx = optax.chain(agc(0.01, track=True), optax.sgd(0.1))
  state = tx.init(params)
  zeros = {"clip_fraction": 0, "max_ratio": 0, "nonfinite_units": 0}
  assert jax.tree.map(float, agc_metrics(state)) == {"a/kernel": zeros, "b/kernel": zeros}
  metrics = jax.jit(lambda g, s, p: agc_metrics(tx.update(g, s, p)[1]))(grads, state, params)
  np.testing.assert_allclose(metrics["a/kernel"]["clip_fraction"], 0.6)
  np.testing.assert_allclose(metrics["a/kernel"]["max_ratio"], 3.0, rtol=1e-6)
  assert jax.tree.map(float, metrics["b/kernel"]) == zeros


def test_state_keeps_its_structure_and_is_empty_when_off():
  params = {"kernel": jnp.ones((2, 3))}
  for kwargs, leaves in ({}, 0), ({"clipping": lambda step: 0.1}, 1), ({"track": True}, 3):
    tx = agc(**kwargs)
    state = tx.init(params)
    assert len(jax.tree.leaves(state)) == leaves
    after = tx.update(params, state, params)[1]
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)


@pytest.mark.parametrize("tx", [agc(), optax.chain(agc(lambda step: 0.1), optax.sgd(0.1)), optax.sgd(0.1)])
def test_metrics_of_what_is_not_tracked_are_an_error(tx):
  with pytest.raises(ValueError, match=r"nothing is tracked .* make it with agc\(\.\.\., track=True\)"):
    agc_metrics(tx.init({"kernel": jnp.ones((2, 3))}))


def test_metrics_of_one_parameter_tracked_twice_are_an_error():
  tx = optax.chain(agc(0.1, track=True), agc(0.01, track=True))
  with pytest.raises(ValueError, match="two agc's with track=True clip 'kernel'"):
    agc_metrics(tx.init({"kernel": jnp.ones((2, 3))}))


def test_without_tracking_nothing_but_norms_is_reduced():
  params = {"kernel": jnp.ones((2, 3))}
  tx = agc()
  jaxpr = str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))
  assert jaxpr.count("reduce_sum") == 2  # the squares of g and of w
  assert "reduce_max" not in jaxpr


def test_schedule_sees_the_step_from_zero():
  params, grads = {"kernel": jnp.ones((1, 1))}, {"kernel": jnp.ones((1, 1))}
  calls = []

  def schedule(step):
    calls.append(step)
    return 0.1 / (step + 1)

  tx = agc({"kernel": schedule, "other|bias": 0.5})
  params["bias"] = grads["bias"] = jnp.ones(1)
  state = tx.init(params)
  seen = []
  for _ in range(3):
    out, state = tx.update(grads, state, params)
    seen.append(float(out["kernel"][0, 0]))
    assert float(out["bias"][0]) == 0.5
  np.testing.assert_allclose(seen, [0.1, 0.05, 0.1 / 3], rtol=1e-6)
  assert int(state.count) == len(calls) == 3


def test_mapping_takes_the_first_match():
  params = {"stem": {"kernel": jnp.ones((1, 2))}, "body": {"kernel": jnp.ones((1, 2))}, "fc": {"kernel": jnp.ones((1, 2))}}
  out = clip(params, params, {"^stem/": 0.5, "kernel$": 0.25}, exclude="fc/kernel")
  assert [float(out[name]["kernel"][0, 0]) for name in ("stem", "body", "fc")] == [0.5, 0.25, 1.0]


TREE = {"conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)}, "fc": {"kernel": jnp.ones((4, 2))}}


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, True, "0.01", None, np.zeros(3)])
def test_bad_numbers(bad):
  with pytest.raises(ValueError, match="clipping must be a positive finite number or a schedule, got"):
    agc(bad)
  with pytest.raises(ValueError, match=r"clipping\['kernel'\] must be"):
    agc({"kernel": bad})
  with pytest.raises(ValueError, match="eps must be a positive finite number, got"):
    agc(0.01, bad)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"exclude": "fc/kernle"}, r"exclude: pattern 'fc/kernle' matches no parameter. Near it: fc/kernel"),
    ({"exclude": ["fc", "head"]}, r"exclude: pattern 'head' matches no"),
    ({"exclude": "("}, "exclude: expected regular expressions"),
    ({"exclude": 5}, "exclude: expected regular expressions, got 5"),
    ({"exclude": [3]}, "exclude: expected regular expressions"),
    ({"clipping": {"conv": 0.1}}, r"no pattern matches 'fc/kernel'"),
    ({"clipping": {"conv": 0.1, "fc": 0.1, "head": 0.1}}, r"clipping: pattern 'head' matches no"),
    ({"unit_axes": {"dense": (0,)}}, r"unit_axes: pattern 'dense' matches no"),
    ({"unit_axes": {"fc": (2,)}}, r"unit_axes \(2,\) for 'fc/kernel' \(4, 2\): not distinct integers in \[-2, 2\)"),
    ({"unit_axes": {"fc": (0, -2)}}, "not distinct integers"),
    ({"unit_axes": {"fc": "last"}}, "not distinct integers"),
    ({"unit_axes": {"fc": 1}}, "not distinct integers"),
  ],
)
def test_bad_patterns_and_axes(kwargs, message):
  with pytest.raises(ValueError, match=message):
    agc(**kwargs).init(TREE)
  with pytest.raises(ValueError, match=message):
    explain(TREE, **kwargs)


def test_bad_trees():
  tx = agc()
  state = tx.init(TREE)
  with pytest.raises(ValueError, match="params"):
    tx.update(TREE, state)
  with pytest.raises(ValueError, match=r"Gradients \(1 leaves\) and parameters \(3\) differ, as in \['conv/bias'"):
    tx.update({"fc": TREE["fc"]}, state, TREE)
  with pytest.raises(ValueError, match=r"fc/kernel: the gradient has shape \(2, 4\), the parameter \(4, 2\)"):
    tx.update({**TREE, "fc": {"kernel": jnp.ones((2, 4))}}, state, TREE)
  with pytest.raises(TypeError, match="w: agc takes real numbers, got complex64"):
    tx.init({"w": jnp.ones(3, jnp.complex64)})
  with pytest.raises(TypeError, match="w: agc takes real numbers"):
    tx.update({"w": jnp.ones(3, jnp.complex64)}, state, {"w": jnp.ones(3)})
  with pytest.raises(ValueError, match="Two leaves share a path: 'a/b'"):
    tx.init({"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)})
  with pytest.raises(TypeError, match="reshape"):
    clip(TREE, TREE, lambda step: jnp.ones(3))


@pytest.mark.parametrize("tree", [{}, (), {"a": {}, "b": None}, {"a": optax.MaskedNode()}])
def test_empty_trees(tree):
  tx = agc(0.01, track=True)
  out, state = tx.update(tree, tx.init(tree), tree)
  assert jax.tree.structure(out) == jax.tree.structure(tree)
  assert agc_metrics(state) == {}
  assert explain(tree)
  assert agc(exclude="fc").init({}) == AGCState()


def test_leaves_that_pass():
  params = {"w": jnp.ones((2, 2)), "n": jnp.arange(2), "none": None, "frozen": jnp.ones((2, 2)), "z": jnp.ones(1) * 1j}
  grads = {"w": None, "n": np.zeros(2, jax.dtypes.float0), "none": None, "frozen": jnp.ones((2, 2)), "z": jnp.ones(1) * 5j}
  tx = agc(0.01, exclude=lambda path, leaf: path == "frozen" or leaf.dtype == jnp.complex64, track=True)
  out, state = tx.update(grads, tx.init(params), params)
  assert out["w"] is None and out["none"] is None
  assert all(out[name] is grads[name] for name in ("n", "frozen", "z"))
  assert agc_metrics(state).keys() == {"w"}
  assert [entry.why for entry in explain_entries(params, exclude="frozen|z")][1:4] == ["not a float", "masked", "rank"]


def test_scalars_and_lone_arrays():
  assert float(clip(1.0, 2.0, 0.01)) == pytest.approx(0.02)
  np.testing.assert_allclose(clip(jnp.ones((4, 3)), jnp.ones((4, 3)), 0.01), 0.01, rtol=1e-6)
  for shape in (0, 3), (3, 0):
    chex.assert_shape(clip({"kernel": jnp.ones(shape)}, {"kernel": jnp.ones(shape)}, track=True)["kernel"], shape)


def test_help_has_the_rules_by_which_units_are_found():
  """`from nfnets import agc` hides the module behind the function, whose docstring must therefore have them."""
  assert all(f"\n    {rule} " in nfnets.agc.__doc__ for rule in "override stacked vector rows bias name rank".split())


def test_explain_is_a_table_for_a_person():
  shapes = jax.eval_shape(lambda: TREE)
  table = explain(shapes, {"conv": optax.constant_schedule(0.1), "": 0.02}, exclude="fc/kernel", unit_axes={"bias": (0,)})
  lines = [line.split() for line in table.splitlines()]
  assert lines[0] == ["parameter", "shape", "unit", "axes", "units", "clipping", "why"]
  assert lines[2] == ["conv/bias", "(4,)", "(0,)", "4", "schedule", "unit_axes", "'bias'"]
  assert lines[3] == ["conv/kernel", "(3,", "3,", "2,", "4)", "(3,)", "4", "schedule", "bias"]
  assert lines[4] == ["fc/kernel", "(4,", "2)", "-", "-", "-", "excluded:", "pattern", "'fc/kernel'"]
  assert table.splitlines()[-1] == "2 clipped in 8 units, 1 not clipped."
  assert "rank?" in explain({"kernel": jax.ShapeDtypeStruct((3, 4, 5), jnp.float32)}).splitlines()[-1]
