"""Experiments that train: what their figures say of good and of broken networks, and parts that are kept."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets.config import DataConfig
from nfnets.lab import experiments, task
from nfnets.lab.deep import Deep, DeepConfig
from nfnets.lab.experiment import Measured, Settings, conclude
from nfnets.lab.experiments import (
  agc_inside,
  agc_optimizers,
  backward,
  batch_size,
  covariate_shift,
  forward,
  informative,
  landscape,
  nfify,
  scaling,
  stability_edge,
  train_test,
  without_norm,
)
from nfnets.lab.measures import clipping
from nfnets.lab.progress import Progress
from nfnets.lab.training import Recipe, Trainer, batches
from nfnets.lab.vgg import VGG, VGGConfig

SEEDS = 3
SPREAD = np.array([0.0, 0.001, -0.001])  # between seeds


def verdicts(module, samples):
  measured = Measured(samples=samples, rows=[], draw=lambda figure: None, caption="")
  result = conclude(module.EXPERIMENT, Settings(), measured)
  return {finding.criterion.name: finding.verdict for finding in result.findings}, result.verdict


# ---- runs as the papers would have them, and runs of a network that is broken: it stays at chance, whatever is done to it
def shift_runs(size, cosine, accuracy, unrest):
  """`size`, `cosine`, `accuracy` and `unrest` give a figure for each (kind, norm)."""
  runs = {}
  for kind, norm in covariate_shift.NETWORKS:
    value = size(kind, norm)
    mean = np.cumsum(np.full((5, 4), unrest(norm)), axis=0)
    length = 1.0 if norm == "none" else 0.1  # of the gradient
    run = {"shift": [[0.0, length * value]] * 5, "norm": [[1.0, length]] * 5, "cosine": [[1.0, cosine(norm)]] * 5}
    run |= {"mean": mean.tolist(), "std": np.ones((5, 4)).tolist()}
    runs[kind, norm] = [{**run, "accuracy": accuracy(norm) + spread} for spread in SPREAD]
  return runs


def test_agc_inside():
  paper = dict.fromkeys(agc_inside.ARMS, 0.9) | dict.fromkeys(("none", "without all stages", "head clipped, too"), 0.3)
  paper |= {"global / 4": 0.7, "without stem": 0.9}
  found = lambda accuracy: agc_inside.figures({name: value + SPREAD for name, value in accuracy.items()}, 10)
  assert verdicts(agc_inside, found(paper))[1] == "holds"
  dead = verdicts(agc_inside, found(dict.fromkeys(agc_inside.ARMS, 0.1)))
  assert dead[1] == "does not hold" == dead[0]["gain_large"] == dead[0]["stages"] and "holds" not in dead[0].values()
  assert agc_inside.lower(np.array([2.3, np.nan]), np.array([2.3, 0.3])) == pytest.approx(99.7)
  assert agc_inside.lower(np.full(8, np.inf), np.full(8, np.nan)) == 0  # both dead
  for depth in ((1, 1, 1, 1), agc_inside.LARGE_NETWORK["depth"]):
    blocks = [f"blocks/{i}/conv0/kernel" for i in range(sum(depth))]
    owners = [
      [i for i, path in enumerate(blocks) if re.search(agc_inside.ARMS[f"without {stage}"].left_out(depth), path)]
      for stage in agc_inside.STAGES
    ]
    assert [len(owned) for owned in owners] == list(depth) and sum(owners, []) == list(range(sum(depth)))
  log = {"ratios": np.full((6, 4), 0.1), "clipped": np.ones((6, 2))}
  kept = json.loads(json.dumps(clipping.summary(log, [1, 3])))  # as a part that is kept
  assert np.shape(kept["first"]) == np.shape(kept["last"]) == (2, len(clipping.BINS) - 1) and np.shape(kept["clipped"]) == (6, 2)


def informative_runs(gap, rank, cosine, loss):
  """`gap` gives a figure for each width, `rank` for each (normalizer, width), `cosine` and `loss` for each group size."""
  by_layer = lambda value: np.array([[value * (1 + spread)] * 60 for spread in SPREAD])
  gaps = np.stack([by_layer(gap(width)) for width in informative.WIDTHS], axis=1)
  linears = {
    (norm, width): {key: by_layer(rank(norm, width)) for key in ("effective_rank", "stable_rank")}
    for norm in ("batch_uncentred", "none")
    for width in informative.SQUARE
  }
  sizes = [informative.GROUP_WIDTHS[1] // count for count in informative.GROUPS]
  groups = {
    (informative.GROUP_WIDTHS[1], count): {"cosine": cosine(size) + SPREAD, "stable_rank": 1 / (cosine(size) + SPREAD)}
    for size, count in zip(sizes, informative.GROUPS, strict=True)
  }
  losses = np.stack([[loss(size) for size in sizes]] * SEEDS)
  return informative.figures(gaps, linears, groups, losses)


def test_informative():
  good = informative_runs(
    lambda width: 1 / width, lambda norm, width: 1.0 if norm == "none" else width**0.6, lambda size: 0.1 + size / 50, float
  )
  assert verdicts(informative, good)[1] == "holds"
  collapsed = informative_runs(lambda width: 0.9, lambda norm, width: 1.0, lambda size: 1.0, lambda size: 2.3)
  parts, whole = verdicts(informative, collapsed)
  assert whole == "does not hold" == parts["gap_slope"] == parts["rank_slope"]
  assert parts["group_speed"] == "cannot be told here"  # all sizes alike have no order


def test_one_network_in_the_place_of_all_does_not_hold():
  """Networks that are computed: one whose branches are shut, and one without normalization, each under every name."""
  images, labels = task.images(None, 16)
  shut = forward.profile(DeepConfig(depth=1000, width=4, norm="skipinit"), images, 2, rescale=False)
  samples = forward.figures(dict.fromkeys(forward.NETWORKS, shut))
  parts, whole = verdicts(forward, samples)
  assert whole == "does not hold" == parts["batch_slope"] == parts["none_factor"] == parts["nf_slope"] == parts["skip_init"]
  flat = backward.block_gradients(DeepConfig(depth=12, width=4, norm="skipinit_root"), images, labels, 2)
  parts, whole = verdicts(backward, backward.figures(dict.fromkeys(backward.NETWORKS, flat)))
  assert whole == "does not hold" == parts["batch_factor"] == parts["instance_factor"] and parts["group_order"] != "holds"


def test_agc_inside_counts_the_units_of_each_layer():
  """Two layers of 1 and 3 units, two steps, one seed: each row sums to the share of the layer's units that the bins hold."""
  logged = np.array([[[-3.1, 0.1, 0.1, -30.0], [-3.1, 0.1, -30.0, -30.0]]])
  shares = clipping.by_layer(logged[0], [1, 3])
  place = lambda value: np.searchsorted(clipping.BINS, value) - 1
  assert shares.shape == (2, len(clipping.BINS) - 1) and shares[0, place(-3.1)] == 1 and shares[0].sum() == 1
  assert shares[1, place(0.1)] == shares[1].sum() == 0.5


def test_covariate_shift():
  good = shift_runs(
    lambda kind, norm: 0.2 if norm == "none" else 0.3,
    lambda norm: 0.9 if norm == "none" else 0.8,
    lambda norm: 0.8 if norm == "none" else 0.95,
    lambda norm: 0.5 if norm == "noisy_batch" else 0.2,
  )
  parts, whole = verdicts(covariate_shift, covariate_shift.figures(good, 10))
  assert parts.pop("vgg_absolute") == "does not hold" == whole and set(parts.values()) == {
    "holds"
  }  # shorter gradients shift less
  reduced = shift_runs(lambda kind, norm: 0.3 if norm == "none" else 0.1, lambda norm: 0.9, lambda norm: 0.9, lambda norm: 0.2)
  parts, whole = verdicts(covariate_shift, covariate_shift.figures(reduced, 10))
  assert whole == "does not hold" == parts["vgg_shift"] == parts["linear_shift"]
  dead = shift_runs(lambda kind, norm: float("nan"), lambda norm: float("nan"), lambda norm: float("nan"), lambda norm: 0.2)
  assert verdicts(covariate_shift, covariate_shift.figures(dead, 10))[1] == "cannot be told here"
  guessing = shift_runs(
    lambda kind, norm: 0.2 if norm == "none" else 0.3,
    lambda norm: 0.9,
    lambda norm: 0.8 if norm == "none" else 0.1,
    lambda norm: 0.2 if norm == "none" else 0.5,
  )
  assert "holds" not in verdicts(covariate_shift, covariate_shift.figures(guessing, 10))[0].values()
  still = shift_runs(
    lambda kind, norm: 0.0 if norm == "none" else 0.3,
    lambda norm: 0.9,
    lambda norm: 0.1 if norm == "none" else 0.9,
    lambda norm: 0.0 if norm == "none" else 0.5,
  )
  parts, _ = verdicts(covariate_shift, covariate_shift.figures(still, 10))
  assert {name for name, found in parts.items() if found == "holds"} == {"noisy_as_batch"}  # the only part without the dead one


def landscape_runs(size):
  runs = {}
  for name in (*landscape.NETWORKS, *landscape.RESIDUAL):
    value = [size(name)] * 4
    run = {"smoothness": value, "change": value, "gradient": [1.0] * 4, "highest": value, "lowest": [0.0] * 4, "theorem": 1.0}
    runs[name] = [{**run, "accuracy": 0.9 if size(name) else 0.1}] * SEEDS  # what is frozen has not learned
  return runs


def test_landscape():
  smoother = landscape.figures(landscape_runs(lambda name: 5.0 if name.endswith("none") else 1.0), 10)
  assert verdicts(landscape, smoother)[1] == "holds"
  rougher = landscape.figures(landscape_runs(lambda name: 1.0 if name.endswith("none") else 5.0), 10)
  assert verdicts(landscape, rougher)[1] == "does not hold"
  broken = verdicts(landscape, {**rougher, "theorem": [2.0] * SEEDS})[0]
  assert broken["theorem"] == "does not hold"
  rough = landscape_runs(lambda name: 5.0 if name.endswith("none") else 1.0)
  for name in ("none", "ResNet, none"):
    rough[name] = [{**run, "accuracy": 0.1} for run in rough[name]]  # rough, but dead
  assert set(verdicts(landscape, landscape.figures(rough, 10))[0].values()) == {"cannot be told here", "holds"}
  assert verdicts(landscape, landscape.figures(rough, 10))[1] == "cannot be told here"
  frozen = landscape.figures(landscape_runs(lambda name: 5.0 if name.endswith("none") else 0.0), 10)
  assert "holds" not in {**verdicts(landscape, frozen)[0], "theorem": ""}.values()


def size_runs(value):
  sizes, lambdas = (4, 64, 1024), (0.01, 0.04, 0.16)
  names = batch_size.arms(lambdas)
  accuracy = {name: np.stack([value(name, size) + SPREAD for size in sizes]) for name in names}
  return batch_size.figures(accuracy, sizes, lambdas, 10)


def test_batch_size():
  best = {4: "0.16", 64: "0.04", 1024: "0.01"}

  def good(name, size):
    if name == "batch":
      return 0.7 if size == 4 else 0.9
    if name == "NF":
      return 0.5 if size == 1024 else 0.9
    return 0.9 if name.endswith(best[size]) else 0.85

  assert verdicts(batch_size, size_runs(good))[1] == "holds"
  parts, whole = verdicts(batch_size, size_runs(lambda name, size: 0.9 if name == "batch" else 0.1))
  assert whole == "does not hold" and "holds" not in parts.values()
  parts, _ = verdicts(batch_size, size_runs(lambda name, size: 0.1 if name == "batch" else good(name, size)))
  assert parts["small"] == parts["middle"] == "cannot be told here"  # batch normalization that learns at no size is broken
  parts, whole = verdicts(batch_size, size_runs(lambda name, size: float("nan")))
  assert "holds" not in parts.values()


def test_train_test():
  batch = {"running": 0.95, "batches": 0.94, "one class": 0.2, "single": 0.1, "shifted, running": 0.3, "shifted, batches": 0.9}
  free = {**dict.fromkeys(batch, 0.9), "difference": 0.0}
  good = {"batch": [{**batch, "difference": 0.2}] * SEEDS, "NF": [free] * SEEDS}
  assert verdicts(train_test, train_test.figures(good, 10))[1] == "holds"
  parts, whole = verdicts(train_test, train_test.figures({"batch": good["batch"], "NF": good["batch"]}, 10))
  assert parts["nf_same"] == parts["nf_mix"] == "does not hold" == whole
  assert verdicts(train_test, train_test.figures({"batch": good["NF"], "NF": good["NF"]}, 10))[0]["single"] == "does not hold"
  constant = [{**dict.fromkeys(batch, 0.1), "difference": 0.0}] * SEEDS
  parts, whole = verdicts(train_test, train_test.figures({**good, "NF": constant}, 10))
  assert whole == parts["nf_same"] == parts["nf_mix"] == "cannot be told here"


def test_agc_and_optimizers():
  def runs(value):
    return {(n, w): np.stack([value(n, w) + SPREAD] * 3) for n in agc_optimizers.RATES for w in agc_optimizers.WAYS}

  good = runs(lambda name, where: 0.9 if (name, where) == ("SGD", "before") or where == "behind" or name == "LARS" else 0.3)
  lengths = lambda value: {(n, w): np.full((SEEDS, 9), value(n, w)) for n in agc_optimizers.RATES for w in agc_optimizers.WAYS}
  shorter = lengths(lambda name, where: 0.1 if (name, where) == ("SGD", "before") else 1.0)
  assert verdicts(agc_optimizers, agc_optimizers.figures(good, shorter, 10))[1] == "holds"
  dead = agc_optimizers.figures(runs(lambda name, where: 0.1), lengths(lambda name, where: np.nan), 10)
  parts, whole = verdicts(agc_optimizers, dead)
  assert whole == "cannot be told here" and "holds" not in parts.values()
  useless = agc_optimizers.figures(runs(lambda name, where: 0.9), shorter, 10)
  assert verdicts(agc_optimizers, useless)[0]["sgd"] == "does not hold"
  assert parts["sgd_why"] == parts["adamw_why"] == parts["lion_why"] == "cannot be told here"
  late = np.array([1.0, 2.0, np.nan, np.inf, 1, 1, 1, 1, 1, 1, 1, 1])  # dies at the third of twelve steps
  assert agc_optimizers.shortened(np.full(12, 0.5), late) == pytest.approx(np.median([0.5, 0.25]))


def test_the_length_of_a_step_is_relative_to_the_unit():
  before = {"blocks": [{"kernel": jnp.ones((2, 1, 1, 4, 3))}], "stem": {"kernel": jnp.ones((1, 1, 4, 3))}}
  before |= {"fc": {"kernel": jnp.ones((3, 10)), "bias": jnp.zeros(10)}}
  after = {
    **before,
    "blocks": [{"kernel": 1.5 * before["blocks"][0]["kernel"]}],
    "fc": {"kernel": jnp.zeros((3, 10)), "bias": jnp.ones(10)},
  }
  assert float(agc_optimizers.step_length(before, after)) == pytest.approx(0.5)  # six units of nine


def test_nfify():
  good = {"power": [1.0, 1.04], "gradient": [1.0, 2.0], "cosine": 0.5}
  accuracy = {"batch": 0.95 + SPREAD, "NF": 0.95 + SPREAD}
  assert verdicts(nfify, nfify.figures({"batch": [good] * SEEDS, "NF": [good] * SEEDS}, accuracy, 10))[1] == "holds"
  exploding = {"power": [1.0, 1024.0], "gradient": [1.0, 1e6], "cosine": 1.0}
  runs = {"batch": [good] * SEEDS, "NF": [exploding] * SEEDS}
  parts, _ = verdicts(nfify, nfify.figures(runs, {"batch": 0.95 + SPREAD, "NF": 0.8 + SPREAD}, 10))
  assert set(parts.values()) == {"does not hold"}
  collapsed, guessing = {**good, "cosine": 1.0}, {**accuracy, "NF": 0.1 + SPREAD}
  parts, _ = verdicts(nfify, nfify.figures({"batch": [collapsed] * SEEDS, "NF": [collapsed] * SEEDS}, guessing, 10))
  assert "holds" not in parts.values()
  without = {"batch": [good] * SEEDS, "NF": [{**good, "gradient": [0.0, 0.0]}] * SEEDS}
  parts, _ = verdicts(nfify, nfify.figures(without, {"batch": 0.1 + SPREAD, "NF": 0.1 + SPREAD}, 10))
  assert parts["backward"] == parts["accuracy"] == "cannot be told here"


def test_without_norm():
  good = dict.fromkeys(without_norm.NETWORKS, 0.95 + SPREAD) | {"DyT": 0.85 + SPREAD, "Derf": 0.86 + SPREAD}
  assert verdicts(without_norm, without_norm.figures(good, 10))[1] == "holds"
  parts, whole = verdicts(without_norm, without_norm.figures({**good, "NF": 0.1 + SPREAD, "DyT": 0.95 + SPREAD}, 10))
  assert whole == "does not hold" == parts["nf"] == parts["dyt"] == parts["nf_dyt"]
  guessing = {**good, "DyT": 0.1 + SPREAD, "Derf": 0.1 + SPREAD}
  parts, whole = verdicts(without_norm, without_norm.figures(guessing, 10))
  assert whole == parts["dyt"] == parts["nf_dyt"] == parts["derf"] == "cannot be told here"
  assert without_norm.best_rate(np.array([[0.5, 0.5], [np.nan, 0.9], [0.6, 0.6]])) == 2


def test_scaling():
  """Points on a power law are found again; networks that learn nothing have no slope."""
  compute, widths = np.logspace(8, 10, 8), np.array([4, 4, 8, 8, 16, 16, 32, 32])
  law = np.stack([2 * (compute / 1e8) ** -0.3 * (1 + spread) for spread in SPREAD])
  found = scaling.figures(compute, law, widths, 10)
  np.testing.assert_allclose(found["slope"], -0.3, rtol=1e-6)
  assert verdicts(scaling, found)[0]["slope"] == verdicts(scaling, found)[0]["straight"] == "holds"
  assert verdicts(scaling, found)[0]["larger"] == "does not hold"  # all lie on the line, so that width rises as over all
  crossing = np.tile(compute[:4], 2), np.repeat([4, 32], 4)  # the wide network falls below the narrow one
  loss = np.stack([np.concatenate([[1.5, 1.3, 1.2, 1.15], [2.0, 1.5, 1.0, 0.5]]) * (1 + spread) for spread in SPREAD])
  assert verdicts(scaling, scaling.figures(crossing[0], loss, crossing[1], 10))[0]["larger"] == "holds"
  assert list(scaling.frontier(np.array([1.0, 2.0, 3.0, 4.0]), np.array([4.0, 5.0, 3.0, 3.5]))) == [0, 2]
  parts, whole = verdicts(scaling, scaling.figures(compute, law + np.log(10), widths, 10))
  assert "holds" not in parts.values() and whole != "holds"  # steep, but no better than guessing


def test_batch_sharpness_far_from_the_edge_does_not_hold():
  curves = np.ones((SEEDS, 9, 2))
  parts, whole = verdicts(
    stability_edge, stability_edge.figures(dict.fromkeys(stability_edge.NETWORKS, curves), 0.4 * np.ones((SEEDS, 9, 3)))
  )
  assert parts["stochastic"] == "does not hold" == whole and parts["plain"] == "holds"
  assert parts["rises"] == "cannot be told here"  # it begins there


def test_a_flat_network_does_not_rise_to_the_edge():
  flat = np.tile(np.linspace(1e-8, 1e-6, 9)[:, None], (SEEDS, 1, 2))
  parts, _ = verdicts(stability_edge, stability_edge.figures(dict.fromkeys(stability_edge.NETWORKS, flat), flat))
  assert set(parts.values()) == {"does not hold"}
  rising = np.tile(np.minimum(np.linspace(0.3, 1.8, 9), 1.0)[:, None], (SEEDS, 1, 2))
  assert verdicts(stability_edge, stability_edge.figures(dict.fromkeys(stability_edge.NETWORKS, rising), rising))[1] == "holds"


# ---- what all of them stand on
def test_a_training_learns_and_is_watched():
  data = task.data(None)
  config = DeepConfig(depth=1, width=8, norm="nf", in_features=data.channels)
  recipe = Recipe(batch=64, steps=60)
  watch = lambda before, after, images, labels, key: jnp.sum((after["fc"]["kernel"] - before["fc"]["kernel"]) ** 2)
  trainer = Trainer(lambda key: Deep(config, key), data, recipe, watch=watch, every=20)
  order = batches(len(data.train[1]), recipe, 0)
  params, losses, seen = trainer.train(trainer.init(0), order, 0.2, 0.16)
  accuracy, loss = trainer.test(params)
  assert losses[-1] < 0.5 * losses[0] and accuracy > 0.6 and loss < losses[0]
  assert seen.shape == (3,) and (seen > 0).all()
  frozen, *_ = trainer.train(trainer.init(0), order, 0.2, 1e-9)  # AGC that lets almost nothing through, but for the classifier
  first = trainer.init(0)
  np.testing.assert_allclose(frozen["stem"]["kernel"], first["stem"]["kernel"], atol=1e-4)
  assert np.abs(frozen["fc"]["kernel"] - first["fc"]["kernel"]).max() > 1e-2


def test_noise_is_for_training_alone():
  data = task.data(None)
  trainer = Trainer(
    lambda key: Deep(DeepConfig(depth=1, width=8, norm="noisy_batch", in_features=data.channels), key),
    data,
    Recipe(batch=8, steps=1),
  )
  params, images = trainer.init(0), data.test[0]
  assert trainer.test(params, len(images))[1] == pytest.approx(float(trainer.loss(params, *data.test)))
  assert float(trainer.loss(params, *data.test, key=jax.random.key(0))) != pytest.approx(float(trainer.loss(params, *data.test)))


def test_order_of_batches():
  order = np.asarray(batches(10, Recipe(batch=4, steps=5), 0))
  assert order.shape == (5, 4) and sorted(order.ravel()[:10]) == list(range(10))


def test_images_of_a_config():
  """A dataset's images are averaged to 16 pixels a side; each 2×2 of them lie at one place."""
  whole, cut = (task.data(DataConfig(name="digits", mean=(77.8,) * 3, std=(95.9,) * 3), cut=cut) for cut in (False, True))
  assert whole.train[0].shape == (1437, 16, 16, 3) and cut.train[0].shape == (1437, 8, 8, 12) and cut.classes == 10
  np.testing.assert_array_equal(cut.test[0][0, 1, 2], np.asarray(whole.test[0][0, 2:4, 4:6]).ravel())
  assert task.data(None).train[0].shape == (1437, 4, 4, 12)
  few = task.data(DataConfig(name="digits", mean=(77.8,) * 3, std=(95.9,) * 3), cut=False, small=True)
  assert few.train[0].shape == (1437, 8, 8, 3) and few.test[0].shape == (360, 8, 8, 3)
  np.testing.assert_allclose(few.test[0][3, 1, 2], whole.test[0][3, 2:4, 4:6].mean(axis=(0, 1)), rtol=1e-5)


def test_parts_are_kept_one_by_one(tmp_path):
  file, done, shares = tmp_path / "made_up.parts", [], []

  def job(name, fails=False):
    def work():
      if fails:
        raise RuntimeError(name)
      done.append(name)
      return {"value": name}

    return work

  names = [f"part {i}" for i in range(6)]
  with pytest.raises(RuntimeError, match="part 5"):
    Progress(shares.append, file).parts({name: job(name, name == "part 5") for name in names})
  with file.open("a") as text:
    text.write('\n{"part": "part 4", "val')  # a killed run leaves half a line
  before = len(done)
  found = Progress(shares.append, file).parts({name: job(name) for name in names})
  assert list(found) == names and [value["value"] for value in found.values()] == names
  assert len(done) == 6 and before >= 1 and shares[-1] == 1
  assert Progress(shares.append, None).parts({"a": lambda: 1}) == {"a": 1}


def test_other_settings_begin_anew(tmp_path):
  """Parts of other settings are not taken."""
  from nfnets.lab import runner

  seen = []

  def run(settings, progress):
    value = progress.parts({"a": lambda: seen.append(settings.seeds) or settings.seeds})["a"]
    if settings.seeds == 1:
      raise OSError("stopped")
    return Measured(samples={"slope": [float(value)] * 3}, rows=[], draw=lambda figure: figure.subplots(), caption="")

  made = dataclasses.replace(experiments.get("forward"), name="made_up", run=run)
  made = dataclasses.replace(made, criteria=(dataclasses.replace(made.criteria[0], name="slope"),))
  for _ in range(2):
    with pytest.raises(OSError):
      runner.run([made], Settings(seeds=1), tmp_path, lambda step: None)
  assert seen == [1] and (tmp_path / "made_up.parts").is_file()
  runner.run([made], Settings(seeds=2), tmp_path, lambda step: None)
  assert seen == [1, 2] and not (tmp_path / "made_up.parts").exists()
  log = (tmp_path / "made_up.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in log[1:]] == [{"part": "a", "value": 2}]
  assert json.loads((tmp_path / "made_up.json").read_text())["findings"][0]["samples"] == [2, 2, 2]


@pytest.mark.parametrize("network", ["deep", "vgg"])
def test_running_statistics_are_those_of_training_batches(network):
  """Batches of all images, of which each moves the averages to the same statistics, answer as those statistics do."""
  data = task.data(None)
  few = dataclasses.replace(data, train=(data.train[0][:60], data.train[1][:60]), test=(data.train[0][:60], data.train[1][:60]))
  shape = {"norm": "batch", "num_classes": 10, "in_features": data.channels}
  deep, vgg = DeepConfig(depth=4, width=8, stages=2, **shape), VGGConfig(width=(8, 8), **shape)
  make = (lambda key: Deep(deep, key)) if network == "deep" else (lambda key: VGG(vgg, key))
  trainer = Trainer(make, few, Recipe(batch=60, steps=1))
  params = trainer.init(0)
  own, averaged = trainer.test(params)[1], trainer.test(params, running=True)[1]
  assert averaged == pytest.approx(own, rel=0.02)
  lone, kept = trainer.test(params, 1)[1], trainer.test(params, 1, running=True)[1]
  assert kept == pytest.approx(averaged, rel=1e-5) and abs(lone - own) > 0.002 * own  # whatever the test's batches are


def test_what_is_said_of_a_network_of_the_users_own():
  """A network without a signal or a gradient gets no number."""
  behind = lambda sizes: {str(i): {"var": size, "mean_sq": 0.0} for i, size in enumerate(sizes)}
  assert forward.growth(behind(np.arange(1.0, 17.0))) == pytest.approx(0)  # linear
  assert forward.growth(behind(2.0 ** np.arange(16))) == pytest.approx(11)  # doubling
  assert forward.growth(behind([1.0, np.nan])) == 127 and np.isnan(forward.growth(behind([0.0, 0.0])))
  norms = {f"blocks/{i}/kernel": 10.0**-i for i in range(4)}
  assert backward.quarters({**norms, "fc/bias": 1e9}) == pytest.approx(3)
  assert np.isnan(backward.quarters(dict.fromkeys(norms, 0.0)))
  alike = {"cosine": 0.3, "stable_rank": 2.0}
  assert informative.apart({"pool": alike, "logits": {**alike, "cosine": 0.9}}) == 0.3 == informative.apart({"logits": alike})
  assert np.isnan(informative.apart({"logits": {"cosine": 0.0, "stable_rank": np.nan}}))
  accuracy = {"batch": 0.7 + SPREAD, "NF + AGC 0.01": 0.9 + SPREAD, "mine": 0.9 + SPREAD}
  accuracy = {name: np.stack([value] * 2) for name, value in accuracy.items()}
  found = batch_size.of_model("mine", accuracy, (0.01,), 10)
  np.testing.assert_allclose(found["yours_small"], 0.2)
  np.testing.assert_allclose(found["yours_large"], 0.0, atol=1e-12)
