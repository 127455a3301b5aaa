"""`python -m launch.lab`: its mistakes are one line, its list is complete, and broken networks get no praise."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax import nnx

from launch import lab as program
from nfnets.errors import UserError
from nfnets.lab import experiments, task
from nfnets.lab.deep import DeepConfig
from nfnets.lab.experiment import Measured, Settings, conclude
from nfnets.lab.experiments import backward, forward

ROOT = pathlib.Path(__file__).resolve().parents[2]


def wrong(seed):
  """What a user might name by mistake: it makes no network."""
  return seed


def fails(seed):
  """A function whose own code fails."""
  raise ZeroDivisionError("in\ntheir code")


def takes_two(seed, more):
  """A function with an argument too many."""


class Net(nnx.Module):
  """Takes grey images of a pixel, or of any size with `flat`; its answers are then no [batch, classes]."""

  def __init__(self, flat):
    self.flat = flat

  def __call__(self, images):
    return images.reshape(-1) if self.flat else images @ jnp.ones((7, 10))


refuses = lambda seed: Net(False)
flattens = lambda seed: Net(True)


def values(*arguments):
  found = flags.FlagValues()
  program.define(found)
  found(["lab", *arguments])
  return found


@pytest.mark.parametrize(
  ("arguments", "names", "said"),
  (
    ([], [], "which experiment"),
    ([], ["forwrad"], "expected forward"),
    ([], ["all", "forward"], "stands alone"),
    ([f"--model={__file__}:fails"], ["forward"], "FUNCTION\\(0\\) fails: ZeroDivisionError: in their code"),
    ([f"--model={__file__}:takes_two"], ["forward"], "missing 1 required positional argument"),
    ([f"--model={__file__}:refuses"], ["forward"], r"cannot be called with images \[2, 32, 32, 3\]: TypeError"),
    ([f"--model={__file__}:flattens"], ["forward"], r"expected logits \[batch, classes\], got \(6144,\)"),
    (["--model=nf_resnet_tyny"], ["forward"], "nf_resnet_tiny"),
    (["--model=none.py:make"], ["forward"], "no file none.py"),
    ([f"--model={ROOT / 'README.md'}:make"], ["forward"], "is no Python file"),
    ([f"--model={__file__}:nothing"], ["forward"], "no function nothing"),
    ([f"--model={__file__}:wrong"], ["forward"], "expected an nnx.Module"),
    ([f"--out={__file__}/x"], ["forward"], "is a file"),
  ),
)
def test_mistakes(arguments, names, said):
  with pytest.raises(UserError, match=said) as error:
    program.run(values("--compiled=off", *arguments), *names)
  assert "\n" not in str(error.value)


def test_a_mistake_is_one_line_and_status_2():
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  for arguments in (["forwrad"], ["forward", "--seeds=0"]):
    command = [sys.executable, "-m", "launch.lab", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, len(done.stderr.splitlines()), done.stdout) == (2, 1, "")


def test_the_report_shows_what_chose_the_images():
  words = [
    "batch_size",
    "--config",
    "a.py",
    "--config.data.dir=a b",
    "--config.model.scan",
    "--seeds=1",
    "--out",
    "lab",
    "-config.batch=8",
  ]
  assert program._of_config([]) == []
  found = program._of_config(words)
  assert found == ["--config", "a.py", "--config.data.dir=a b", "--config.model.scan", "-config.batch=8"]


def test_list(capsys):
  assert program.run(values(), "list") == 0
  printed = capsys.readouterr().out
  assert all(name.split("_")[0] in printed for name in experiments.names())


def test_images_are_real_and_normalised():
  images, labels = task.images()
  assert images.shape == (1437, 8, 8, 3) and set(np.asarray(labels)) == set(range(10))
  assert abs(float(images.mean())) < 0.02 and float(images.std()) == pytest.approx(1, abs=0.02)
  assert task.images(count=4, side=16)[0].shape == (4, 16, 16, 3)


def test_a_file_that_a_network_reads_is_not_mistaken_for_the_directory(tmp_path, monkeypatch):
  from nfnets.lab import runner

  def run(*arguments, **options):
    raise failure

  monkeypatch.setattr(runner, "run", run)
  failure = FileNotFoundError(2, "No such file", "/weights.msgpack")
  with pytest.raises(FileNotFoundError, match="weights"):
    program.run(values("--compiled=off", f"--out={tmp_path}"), "forward")
  failure = PermissionError(13, "Permission denied", str(tmp_path / "forward.png"))
  with pytest.raises(UserError, match="cannot be written: Permission denied"):
    program.run(values("--compiled=off", f"--out={tmp_path}"), "forward")


# ---- a network that is broken must not get "holds"
def verdicts(experiment, samples):
  measured = Measured(samples=samples, rows=[], draw=lambda figure: None, caption="")
  result = conclude(experiment, Settings(), measured)
  return {finding.criterion.name: finding.verdict for finding in result.findings}, result.verdict


def test_forward_sees_that_batch_normalization_is_missing():
  """The profile of an unnormalized network in the place of the normalized ones, made shorter by repeating it to 1,000 blocks."""
  images, _ = task.images(count=8)
  config = DeepConfig(depth=40, width=8, norm="none")
  broken = forward.profile(config, images, 3, rescale=True)
  long = np.concatenate([broken, np.repeat(broken[:, -1:], 960, axis=1)], axis=1)
  parts, whole = verdicts(forward.EXPERIMENT, forward.figures(dict.fromkeys(forward.NETWORKS, long)))
  assert whole == "does not hold" and parts["batch_slope"] != "holds" and parts["nf_slope"] != "holds"
  parts, whole = verdicts(forward.EXPERIMENT, forward.figures(dict.fromkeys(forward.NETWORKS, np.full_like(long, np.nan))))
  assert set(parts.values()) == {"cannot be told here"} == {whole}


def test_backward_sees_that_alpha_beta_is_missing():
  images, labels = task.images(count=8)
  exploding = backward.block_gradients(DeepConfig(depth=10, width=32, norm="batch", residual=False), images, labels, 2)
  parts, whole = verdicts(backward.EXPERIMENT, backward.figures(dict.fromkeys(backward.NETWORKS, exploding)))
  assert parts["batch_factor"] == "holds" and parts["nf_factor"] == "does not hold" == whole


def test_a_model_of_ones_own(tmp_path):
  """What a file makes is measured beside the others."""
  file = tmp_path / "mine.py"
  file.write_text(
    "from nfnets.lab.vgg import VGG, VGGConfig\nimport jax\nmake = lambda seed: VGG(VGGConfig(), jax.random.key(seed))\n"
  )
  rows = forward._user(Settings(model=f"{file}:make"), 4)
  assert "convs/0" in rows and "" in rows and rows["convs/0"]["var"] > 0
  assert isinstance(jax.devices(), list)
