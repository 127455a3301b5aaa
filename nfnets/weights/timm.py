"""The names that timm's networks give their arrays, ours for them, and which of our networks is which of timm's.

timm's convolutions are [out, in, height, width] with gains [out, 1, 1, 1]; squeeze-and-excite is made of 1×1 convolutions.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_DM: dict[str, Any] = {"dialect": "timm_dm", "activation": "gelu_erf"}
_GELU: dict[str, Any] = {"dialect": "timm", "activation": "gelu_erf"}
_LAYERS = (26, 50, 101)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
  """One of timm's networks.

  Attributes:
    name: ours.
    overrides: fields of our row that differ.
    train_size, test_size: pixels that its published weights were trained with, and are tested with.
    crop_pct: timm's: the part of an image's shorter side that is cut out in a test.
    mean, std: on timm's scale, 0 to 1; None are ImageNet's.
  """

  name: str
  overrides: dict[str, Any]
  train_size: int
  test_size: int
  crop_pct: float = 0.9
  mean: tuple[float, ...] = (0.485, 0.456, 0.406)
  std: tuple[float, ...] = (0.229, 0.224, 0.225)


_A = Architecture
_F_SIZES = ((192, 256), (224, 320), (256, 352), (320, 416), (384, 512), (416, 544), (448, 576), (480, 608))
_F_CROPS = (0.9, 0.91, 0.92, 0.94, 0.951, 0.954, 0.956, 0.96)
_B_SIZES = ((192, 256), (256, 288), (240, 272), (288, 320), (320, 384), (384, 456))
_timm: dict[str, Any] = {"overrides": {"dialect": "timm"}}

ARCHITECTURES = {
  **{
    f"{prefix}nfnet_f{n}": _A(name=f"nfnet_f{n}", overrides=row, train_size=train, test_size=test, crop_pct=_F_CROPS[n])
    for prefix, row, count in (("dm_", _DM, 7), ("", _GELU, 8))
    for n, (train, test) in enumerate(_F_SIZES[:count])
  },
  "nfnet_l0": _A(name="nfnet_l0", overrides={}, train_size=224, test_size=288, crop_pct=1.0),
  **{
    f"eca_nfnet_l{n}": _A(name=f"eca_nfnet_l{n}", overrides={}, train_size=train, test_size=test, crop_pct=1.0)
    for n, (train, test) in enumerate(((224, 288), (256, 320), (320, 384), (352, 448)))
  },
  **{f"nf_seresnet{n}": _A(name=f"nf_seresnet{n}", **_timm, train_size=224, test_size=224) for n in _LAYERS},
  **{f"nf_ecaresnet{n}": _A(name=f"nf_ecaresnet{n}", **_timm, train_size=224, test_size=224) for n in _LAYERS},
  **{f"nf_resnet{n}": _A(name=f"nf_resnet{n}", **_timm, train_size=256, test_size=288, crop_pct=0.94) for n in _LAYERS},
  **{
    f"nf_regnet_b{n}": _A(name=f"nf_regnet_b{n}", **_timm, train_size=train, test_size=test)
    for n, (train, test) in enumerate(_B_SIZES)
  },
  "test_nfnet": _A(
    name="test_nfnet", overrides={}, train_size=160, test_size=160, crop_pct=0.95, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
  ),
}

_BLOCK = {
  "conv1": "conv0",
  "conv2": "conv1",
  "conv2b": "conv1b",
  "conv3": "conv2",
  "downsample.conv": "conv_shortcut",
  "attn.fc1": "se/fc0",
  "attn.fc2": "se/fc1",
  "attn.conv": "eca",
}


def is_theirs(arrays: Mapping[str, np.ndarray]) -> bool:
  """Whether the names are those of timm's normalizer-free networks."""
  return "stem.conv.gain" in arrays or "stem.conv1.gain" in arrays


def to_ours(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
  """Returns the arrays by our names and in our layout, and the names that are none of theirs or have another number of axes."""
  found = [re.match(r"stages\.(\d{1,3})\.(\d{1,3})\.", name) for name in arrays]
  places = sorted({(int(match[1]), int(match[2])) for match in found if match})
  index = {place: i for i, place in enumerate(places)}
  ours, unknown = {}, []
  for name, array in arrays.items():
    known = _name(name, index)
    turned = None if known is None or known in ours else _turn(known, array)
    if known is None or turned is None:
      unknown.append(name)
    else:
      ours[known] = turned
  return ours, unknown


def to_theirs(arrays: Mapping[str, np.ndarray], depth: Sequence[int], *, gate_inside: bool) -> dict[str, np.ndarray]:
  """Returns the arrays by their names and in their layout.

  Args:
    arrays: by our names.
    depth: blocks of each stage.
    gate_inside: whether the gate stands before the last convolution of a block, as in RegNets, and not after it.
  """
  places = [f"stages.{stage}.{block}" for stage, blocks in enumerate(depth) for block in range(blocks)]
  theirs_of = {ours: theirs for theirs, ours in _BLOCK.items()}
  theirs = {}
  for name, array in arrays.items():
    *parts, leaf = name.split("/")
    if parts[0] == "blocks":
      inner = theirs_of.get("/".join(parts[2:]), "")
      inner = inner if gate_inside else inner.replace("attn.", "attn_last.")
      path = [places[int(parts[1])], *filter(None, [inner])]
    elif parts[0] == "stem" and parts[1:]:
      path = [f"stem.conv{int(parts[1].removeprefix('conv')) + 1}"]
    else:
      path = [{"stem": "stem.conv", "fc": "head.fc"}.get(parts[0], parts[0])]
    leaf = {"kernel": "weight", "skip_gain": "skipinit_gain"}.get(leaf, leaf)
    theirs[".".join([*path, leaf])] = _turn_back(name, array)
  return theirs


def _name(name: str, index: Mapping[tuple[int, int], int]) -> str | None:
  """Our name for one of theirs, given the number of each block by its stage and its place there."""
  path, _, leaf = name.rpartition(".")
  leaf = {"weight": "kernel"}.get(leaf, leaf)
  if match := re.fullmatch(r"stages\.(\d{1,3})\.(\d{1,3})(?:\.(.+))?", path):
    block = f"blocks/{index[int(match[1]), int(match[2])]}"
    if match[3] is None:
      return f"{block}/skip_gain" if leaf == "skipinit_gain" else None
    inner = _BLOCK.get(match[3].replace("attn_last.", "attn."))
    return None if inner is None else f"{block}/{inner}/{leaf}"
  if match := re.fullmatch(r"stem\.conv([1-4])", path):
    return f"stem/conv{int(match[1]) - 1}/{leaf}"
  place = {"stem.conv": "stem", "final_conv": "final_conv", "head.fc": "fc"}.get(path)
  return None if place is None else f"{place}/{leaf}"


def _turn(name: str, array: np.ndarray) -> np.ndarray | None:
  """Their array in our layout; None where it has another number of axes than its name says."""
  kind = _kind(name)
  axes = {"conv": 4, "gain": 4, "se": 4, "eca": 3, "fc": 2}.get(kind, array.ndim)
  if array.ndim != axes or kind in ("gain", "se") and math.prod(array.shape[2:]) != 1:
    return None
  if kind == "gain":
    return array.reshape(-1) if array.shape[1] == 1 else None
  turns = {"conv": (2, 3, 1, 0), "eca": (2, 1, 0), "fc": (1, 0)}
  return array[:, :, 0, 0].T if kind == "se" else array.transpose(turns[kind]) if kind in turns else array


def _turn_back(name: str, array: np.ndarray) -> np.ndarray:
  kind = _kind(name)
  if kind == "gain":
    return array.reshape(-1, 1, 1, 1)
  turns = {"conv": (3, 2, 0, 1), "eca": (2, 1, 0), "fc": (1, 0), "se": (1, 0)}
  turned = np.ascontiguousarray(array.transpose(turns[kind])) if kind in turns else array
  return turned[:, :, None, None] if kind == "se" else turned


def _kind(name: str) -> str:
  """What the layout follows from: "conv", "gain", "se", "eca", "fc" or "" for one that is the same in both."""
  *_, place, leaf = ["", *name.split("/")]
  if leaf == "kernel":
    return "se" if place in ("fc0", "fc1") else place if place in ("eca", "fc") else "conv"
  return "gain" if leaf == "gain" else ""
