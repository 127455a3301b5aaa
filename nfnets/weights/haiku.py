"""The names that the release's Haiku networks give their arrays, and ours for them.

Theirs are a module and a leaf, "NFNet/~/nf_block_3/~/conv1" and "w"; flat files join them by "/", or by "." without the "~" as
the release's own flatten_haiku_tree does. Convolutions are [height, width, in, out] in both.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Family(NamedTuple):
  """Networks of the release.

  prefix: of our names; module, network: its module and class; variant: prefix of its names; numbers: those that it has.
  """

  prefix: str
  module: str
  network: str
  variant: str = "ResNet"
  numbers: str = "50|101|152|200|288|600"


FAMILIES = (  # of two families of one class the first is what arrays of that class are taken for
  Family("nfnet_f", "nfnet", "NFNet", "F", r"[0-7]\+?"),
  Family("nf_regnet_b", "nf_regnet", "NF_RegNet", "B", "[0-8]"),
  Family("nf_resnet", "nf_resnet", "NF_ResNet"),
  Family("nf_seresnet", "nf_resnet", "NF_ResNet"),
  Family("skipinit_resnet", "skipinit_resnet", "SkipInit_ResNet"),
  Family("fixup_resnet", "fixup_resnet", "FixUp_ResNet"),
  Family("resnet", "resnet", "ResNet"),
)
# class → what its blocks are called
BLOCKS = {
  "NFNet": "nf_block",
  "NF_RegNet": "nf_block",
  "NF_ResNet": "nf_res_block",
  "SkipInit_ResNet": "nf_res_block",
  "FixUp_ResNet": "res_block",
  "ResNet": "res_block_v2",
}
# MD5 of the published files → our name of the network
PUBLISHED = {
  "0a41039da1cb43adf47f1b7d86ddfe0f": "nfnet_f0",
  "c9126bbfaf855f9ddb7ff3b902558781": "nfnet_f1",
  "7a018d8d1498020e2f5a8719a1e7f53f": "nfnet_f2",
  "d8e1e78d26db659c486150dbaccbe78a": "nfnet_f3",
  "f5974a7e3388aa81b91a9f1403e759a4": "nfnet_f4",
  "8639e925de951030651ac775b9f915c3": "nfnet_f5",
  "b16cca40ac1ecec2bd5e3273866da0c1": "nfnet_f6",
}
_MODULES = {"initial_conv": "stem", "final_conv": "final_conv", "linear": "fc", "final_bn": "final_norm"}
_GATE = {"linear": "se/fc0", "linear_1": "se/fc1"}
_LEAVES = {"w": "kernel", "b": "bias", "offset": "bias"}
_STATISTICS = {"mean_ema": "mean", "var_ema": "var"}


def family_of(name: str) -> Family | None:
  """The family of one of our networks, small ones included; None where the release has no such class."""
  return next((family for family in FAMILIES if name.startswith(family.prefix)), None)


def variant_of(name: str) -> str | None:
  """What the release calls one of our networks, such as "F0+" or "ResNet50"; None where it has no such network."""
  family = family_of(name)
  number = name.removeprefix(family.prefix) if family else ""
  return f"{family.variant}{number}" if family and re.fullmatch(family.numbers, number) else None


def network_of(arrays: Mapping[str, np.ndarray]) -> str | None:
  """The class of the network that the arrays are of, such as "NF_RegNet"; None where the names are not Haiku's."""
  classes = {_parts(name)[0] for name in arrays}
  return classes.pop() if len(classes) == 1 and classes < set(BLOCKS) else None


def to_ours(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
  """Returns the arrays by our names, and the names that are none of theirs.

  Of a moving average the average is taken; `hidden` and `counter`, from which Haiku would go on, are left.
  """
  ours, unknown = {}, []
  for name, array in arrays.items():
    parts = _parts(name)
    if len(parts) > 2 and parts[-2] in _STATISTICS and parts[-1] in ("hidden", "counter"):
      continue
    known = _name(parts)
    if known is None or known in ours:
      unknown.append(name)
    else:
      ours[known] = array.reshape(-1) if "norm" in known else array
  return ours, unknown


def to_theirs(arrays: Mapping[str, np.ndarray], network: str) -> dict[str, dict[str, np.ndarray]]:
  """Returns {module: {leaf: array}} for a network of the given class.

  A moving average gets a counter of a million steps, after which Haiku's correction for the first ones is none.
  """
  modules: dict[str, dict[str, np.ndarray]] = {}
  for name, array in arrays.items():
    module, leaf = _module(name, network)
    if leaf in ("mean", "var") or "norm" in name:
      array = array.reshape(1, 1, 1, -1)
    if leaf in ("mean", "var"):
      average = {"average": array, "hidden": array, "counter": np.asarray(10**6, np.int32)}
      modules[f"{module}/~/{leaf}_ema"] = average
    else:
      modules.setdefault(module, {})[leaf] = array
  return modules


def _parts(name: str) -> list[str]:
  parts = [part for part in re.split(r"[/.]", name) if part != "~"]
  return parts[1:] if len(parts) > 2 and parts[0] in ("params", "state") else parts


def _name(parts: list[str]) -> str | None:
  """Our name for the parts of theirs."""
  network, *rest, leaf = parts
  places, block = [], BLOCKS[network]
  if rest and (found := re.fullmatch(rf"{block}(?:_([1-9]\d{{0,4}}))?", rest[0])):
    places, rest = [f"blocks/{found[1] or 0}"], rest[1:]
    if len(rest) == 2 and rest[0] == "squeeze_excite" and rest[1] in _GATE:
      places, rest = [*places, _GATE[rest[1]]], []
    elif rest and re.fullmatch(r"conv\d|conv1b|conv_shortcut|bn\d", rest[0]):
      places, rest = [*places, rest[0].replace("bn", "norm")], rest[1:]
  elif rest and re.fullmatch(r"stem_conv\d", rest[0]):
    places, rest = [rest[0].replace("_", "/")], rest[1:]
  elif rest and rest[0] in _MODULES:
    places, rest = [_MODULES[rest[0]]], rest[1:]
  if len(rest) == 1 and rest[0] in _STATISTICS and leaf == "average":
    rest, leaf = [], _STATISTICS[rest[0]]
  return None if rest else "/".join([*places, _LEAVES.get(leaf, leaf)])


def _module(name: str, network: str) -> tuple[str, str]:
  """Their module and leaf for our name; mean and var stay as they are."""
  *places, leaf = name.split("/")
  plain = network in ("SkipInit_ResNet", "FixUp_ResNet", "ResNet") or bool(places) and places[-1] in ("fc", "fc0", "fc1")
  norm = bool(places) and "norm" in places[-1]
  leaf = {"kernel": "w", "bias": "offset" if norm else "b" if plain else "bias"}.get(leaf, leaf)
  modules = [network]
  if places and places[0] == "blocks":
    modules.append(BLOCKS[network] + (f"_{places[1]}" if places[1] != "0" else ""))
    gate = {ours: theirs for theirs, ours in _GATE.items()}.get("/".join(places[2:]))
    modules += ["squeeze_excite", gate] if gate else [places[2].replace("norm", "bn")] if places[2:] else []
  elif places and places[0] == "stem" and places[1:]:
    modules.append(f"stem_{places[1]}")
  elif places:
    modules.append({ours: theirs for theirs, ours in _MODULES.items()}[places[0]])
  return "/~/".join(modules), leaf
