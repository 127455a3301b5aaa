"""The training step of the official release in Haiku, in a process of its own (see turns.py); it imports nothing of our nfnets.

The release's package is called nfnets too. It is imported from the directory that the job names, and nothing of it is copied
here: its networks, its SGD_AGC with the groups of its NFNet experiment, its loss and its average are called by one compiled step.
In bfloat16 the whole network computes in bfloat16, standardized weights included, as in the release.
"""

import functools
import importlib
import pathlib
import runpy
import time
from typing import Any

import numpy as np


def start(job: dict[str, Any]) -> "HaikuStep":
  """Builds the network, the optimizer and the batch, and compiles the step.

  Args:
    job: "official" is the directory that holds the release's nfnets/, "module" and "class" name its network, "overrides" are the
      arguments of that; the rest is what `peers.work` says.
  """
  return HaikuStep(job)


class HaikuStep:
  """The release's network with its optimizer, which takes steps on one batch."""

  def __init__(self, job: dict[str, Any]):
    import haiku as hk  # pyrefly: ignore
    import jax

    script = pathlib.Path(__file__).parents[1] / "weights" / "official.py"  # imports nothing of ours either
    runpy.run_path(str(script))["find_release"](job["official"])
    begin = time.perf_counter()
    self.job, self.jax, self.hk = job, jax, hk
    self.optim, self.utils = (importlib.import_module(f"nfnets.{name}") for name in ("optim", "utils"))
    network = getattr(importlib.import_module(f"nfnets.{job['module']}"), job["class"])
    self.forward = hk.transform_with_state(
      lambda images: network(num_classes=job["classes"], **job["overrides"])(images)["logits"]
    )
    device = jax.devices()[0]
    key, self.batch = jax.random.key(job["seed"]), jax.device_put(_batch(job), device)
    params, states = jax.jit(self.forward.init)(key, self.normalised(self.batch[0]))
    self.optimizer = self._optimizer(params)
    average = None if job["ema_decay"] is None else jax.tree.map(np.array, params)
    state = (params, states, self.optimizer.states(), average, np.int32(0))
    self.state = jax.block_until_ready(jax.device_put(state, device))
    build_s, begin = time.perf_counter() - begin, time.perf_counter()
    self.compiled = jax.jit(self.step, donate_argnums=0).lower(self.state, self.batch, key).compile()
    self.key = key
    self.facts = {
      "network": f"the release's {job['class']} {job['overrides']['variant']}, jax.jit",
      "device": device.device_kind,
      "parameters": hk.data_structures.tree_size(params),
      "build_s": build_s,
      "compile_s": time.perf_counter() - begin,
      "versions": {"dm-haiku": hk.__version__, "jax": jax.__version__},
    }

  def normalised(self, images: Any) -> Any:
    """Normalises images, uint8 → float32."""
    return (images.astype(np.float32) - np.float32(self.job["mean"])) / np.float32(self.job["std"])

  def loss_of(self, params: Any, states: Any, batch: Any, key: Any) -> Any:
    """Returns the mean loss of a batch, and the network's new states."""
    images, labels = batch
    job, jax = self.job, self.jax
    images = self.normalised(images)
    if job["dtype"] == "bfloat16":
      images = self.utils.to_bf16(images)
    logits, states = self.forward.apply(params, states, key, images)
    targets = jax.nn.one_hot(labels, job["classes"]) * (1 - job["label_smoothing"]) + job["label_smoothing"] / job["classes"]
    return self.utils.softmax_cross_entropy(logits.astype(np.float32), targets, reduction="mean"), states

  def step(self, state: Any, batch: Any, key: Any) -> tuple[Any, Any]:
    """Takes one step: (new state, loss)."""
    jax, job = self.jax, self.job
    params, states, moments, average, count = state
    used, states = (jax.tree.map(self.utils.to_bf16, (params, states))) if job["dtype"] == "bfloat16" else (params, states)
    of_batch = jax.value_and_grad(self.loss_of, has_aux=True)
    (loss, states), grads = of_batch(used, states, batch, jax.random.fold_in(key, count))
    if job["dtype"] == "bfloat16":
      grads, states = jax.tree.map(self.utils.from_bf16, (grads, states))
    params, moments = self.optimizer.step(params, grads, moments, count)
    if average is not None:
      blend = functools.partial(self.utils.tf1_ema, decay=job["ema_decay"], step=count)
      average = jax.tree.map(blend, average, params)
    return (params, states, moments, average, count + 1), loss

  def _optimizer(self, params: Any) -> Any:
    """Makes the release's optimizer: no decay for gains and biases, no clipping for the classifier's weight."""
    job, partition = self.job, self.hk.data_structures.partition
    is_vector = lambda module, name, value: name in ("scale", "offset", "b") or "gain" in name or "bias" in name
    is_classifier = lambda module, name, value: "linear" in module and "squeeze_excite" not in module
    vectors, kernels = partition(is_vector, params)
    classifier, kernels = partition(is_classifier, kernels)
    groups = [{"params": vectors, "weight_decay": None}, {"params": classifier, "clipping": None}, {"params": kernels}]
    warmup = job["warmup_steps"]
    rate = lambda step: job["learning_rate"] * (self.jax.numpy.minimum(1.0, step / warmup) if warmup else 1.0)
    # Whatever is not None is Nesterov momentum to the release's SGD
    momentum = {"momentum": job["momentum"], "nesterov": True if job["nesterov"] else None}
    clipping = {"clipping": job["clipping"], "eps": job["agc_eps"]}
    return self.optim.SGD_AGC(groups, lr=rate, weight_decay=job["weight_decay"], **momentum, **clipping)

  def seconds(self, steps: int) -> float:
    """Runs `steps` steps in a row, waits for the last one, and returns the seconds of a step."""
    begin = time.perf_counter()
    for _ in range(steps):
      self.state, self.last_loss = self.compiled(self.state, self.batch, self.key)
    self.jax.block_until_ready((self.state, self.last_loss))
    return (time.perf_counter() - begin) / steps

  def loss(self) -> float:
    """Returns the loss of the last step."""
    return float(self.last_loss)


def _batch(job: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
  """Makes the batch of noise that our side makes: images, uint8 [B, S, S, 3], and labels, int32 [B]."""
  draw = np.random.default_rng(job["seed"])
  images = draw.integers(0, 256, (job["batch"], job["size"], job["size"], 3), np.uint8)
  return images, draw.integers(0, job["classes"], job["batch"]).astype(np.int32)
