"""The training step of timm's networks in PyTorch, in a process of its own (see turns.py); it imports nothing of nfnets.

It does the work of our step: it normalises uint8 images on the device, then forward, softmax cross-entropy with smoothed labels,
backward, timm's AGC on all but the classifier's weight, SGD with Nesterov momentum and decay of the kernels alone, and the
parameters' average by timm's ModelEmaV3. timm's AGC takes each number of a gain as a unit of its own, where the published one
takes the whole vector as one; that is as much work.
"""

import os
import time
from typing import Any

import numpy as np


def start(job: dict[str, Any]) -> "TimmStep":
  """Builds the network, the optimizer and the batch.

  Args:
    job: "network" is timm's name of it, "overrides" arguments of timm.create_model, "built" the settings of a network that timm
      does not name (`_built`), "weights" a file of its state_dict in
      safetensors' format or ""; the rest is what `peers.work` says.
  """
  return TimmStep(job)


class TimmStep:
  """timm's network with its optimizer, which takes steps on one batch."""

  def __init__(self, job: dict[str, Any]):
    import timm  # pyrefly: ignore
    import torch  # pyrefly: ignore
    from timm.utils import ModelEmaV3  # pyrefly: ignore

    begin = time.perf_counter()
    self.torch, self.job, self.step = torch, job, 0
    self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    self.cuda = self.device.type == "cuda"
    _set_up(torch, job)
    # Channels last is how cuDNN's tensor cores mostly want it
    self.layout = torch.channels_last if self.cuda and not job["contiguous"] else torch.contiguous_format
    options = {"num_classes": job["classes"], **job["overrides"]}
    network = _built(job["built"], **options) if "built" in job else timm.create_model(job["network"], **options)
    if job["weights"]:
      from safetensors.torch import load_file  # pyrefly: ignore

      network.load_state_dict(load_file(job["weights"]), strict=True)
    self.network = network.to(self.device, memory_format=self.layout).train()
    self.called = torch.compile(self.network) if job["compile"] else self.network
    self.ema = None if job["ema_decay"] is None else ModelEmaV3(self.network, decay=job["ema_decay"])
    self.optimizer = self._optimizer()
    self.clipped = [weight for name, weight in self.network.named_parameters() if name != "head.fc.weight"]
    self.images, self.labels = (torch.from_numpy(array).to(self.device) for array in _batch(job))
    self.mean, self.std = (torch.tensor(job[name], device=self.device) for name in ("mean", "std"))
    build_s, begin = time.perf_counter() - begin, time.perf_counter()
    self.seconds(1)  # compiles
    # The steps before the first timed one choose the fastest kernels, not this one, beside which another process may compute
    torch.backends.cudnn.benchmark = True
    self.facts = {
      "network": f"timm's {job['network']}, PyTorch {'compiled by torch.compile' if job['compile'] else 'eager'}",
      "device": torch.cuda.get_device_name(0) if self.cuda else "cpu",
      "threads": torch.get_num_threads(),
      "parameters": sum(weight.numel() for weight in self.network.parameters()),
      "build_s": build_s,
      "compile_s": time.perf_counter() - begin,
      "versions": {"timm": timm.__version__, "torch": torch.__version__, "CUDA": torch.version.cuda or "none"},
    }

  def _optimizer(self) -> Any:
    """SGD with two groups: kernels decay, gains and biases do not. The learning rate is set before each step."""
    job, groups = self.job, {True: [], False: []}
    for name, weight in self.network.named_parameters():
      groups[name.endswith(".weight")].append(weight)
    decays = [{"params": groups[True], "weight_decay": job["weight_decay"]}, {"params": groups[False], "weight_decay": 0.0}]
    return self.torch.optim.SGD(decays, lr=0.0, momentum=job["momentum"], nesterov=job["nesterov"])

  def seconds(self, steps: int) -> float:
    """Runs `steps` steps in a row, waits for the last one, and returns the seconds of a step."""
    self._wait()
    begin = time.perf_counter()
    for _ in range(steps):
      self._step()
    self._wait()
    return (time.perf_counter() - begin) / steps

  def loss(self) -> float:
    """Returns the loss of the last step."""
    return self.last_loss.item()

  def _step(self) -> None:
    from timm.utils import adaptive_clip_grad  # pyrefly: ignore

    torch, job = self.torch, self.job
    for group in self.optimizer.param_groups:
      warm = min(1.0, self.step / job["warmup_steps"]) if job["warmup_steps"] else 1.0
      group["lr"] = job["learning_rate"] * warm
    images = self.images.to(torch.float32).sub_(self.mean).div_(self.std).permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=self.layout)
    with torch.autocast(self.device.type, torch.bfloat16, enabled=job["dtype"] == "bfloat16"):
      logits = self.called(images)
    loss = torch.nn.functional.cross_entropy(logits.float(), self.labels, label_smoothing=job["label_smoothing"])
    self.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if job["clipping"] is not None:
      adaptive_clip_grad(self.clipped, job["clipping"], job["agc_eps"])
    self.optimizer.step()
    if self.ema is not None:
      self.ema.decay = min(job["ema_decay"], (1 + self.step) / (10 + self.step))
      self.ema.update(self.network)
    self.step += 1
    self.last_loss = loss.detach()

  def _wait(self) -> None:
    if self.cuda:
      self.torch.cuda.synchronize()


def _set_up(torch: Any, job: dict[str, Any]) -> None:
  """Gives PyTorch what JAX has without asking: all cores, and TF32 where float32 is asked for."""
  torch.manual_seed(job["seed"])
  torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
  torch.set_float32_matmul_precision("high")


def _built(settings: dict[str, Any], **options: Any) -> Any:
  """Builds a network of timm's blocks; the pool of its stem, which sets the strides of the stages too, does nothing."""
  import torch  # pyrefly: ignore
  from timm.models.nfnet import NfCfg, NormFreeNet  # pyrefly: ignore

  network = NormFreeNet(NfCfg(**settings), **options)
  network.stem.pool = torch.nn.Identity()
  return network


def _batch(job: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
  """Makes the batch of noise that our side makes: images, uint8 [B, S, S, 3], and labels, int64 [B]."""
  draw = np.random.default_rng(job["seed"])
  images = draw.integers(0, 256, (job["batch"], job["size"], job["size"], 3), np.uint8)
  return images, draw.integers(0, job["classes"], job["batch"])
