"""The texts that stand beside converted weights: a model card, and the config.json of timm, which is read too."""

import json
import pathlib
from typing import Any

from nfnets.config import DataConfig
from nfnets.weights import timm
from nfnets.weights.errors import WeightsError
from nfnets.weights.stored import Stored

_USE = {
  "nfnets": 'from nfnets import predict\n\nclassifier = predict.load("{file}")\nclassifier.top(["photo.png"])',
  "timm": (
    "import safetensors.torch\nimport timm\n\n"
    'model = timm.create_model("{network}", num_classes={classes}).eval()\n'
    'model.load_state_dict(safetensors.torch.load_file("{file}"), strict=True)'
  ),
  "haiku": (
    "# {network} of google-deepmind/deepmind-research, nfnets/; a flat file has module and parameter joined by /\n"
    'from nfnets import predict\n\nclassifier = predict.load("{file}")'
  ),
}


def card(file: str, framework: str, network: str, facts: dict[str, str], stored: Stored, remark: str) -> str:
  """Returns the model card: what the weights are, where they come from, and how they are used.

  Args:
    file: the name of the file of weights.
    framework: whose names the weights have.
    network: what it calls the network.
    facts: the metadata, by name.
    stored: the weights in our names.
    remark: in what outputs differ from those of the source; may be empty.
  """
  count = sum(array.size for array in stored.arrays.values())
  preprocessing: dict[str, Any] = json.loads(facts["preprocessing"])
  rows = {
    "network": f"{network} ({stored.config.model.name} in nfnets, {json.dumps(stored.config.model.all_overrides())})",
    "classes": f"{stored.num_classes:,}",
    "numbers": f"{count:,}",
    "source": facts["source"],
    "SHA-256 of the source": facts["source_sha256"] or "none: a checkpoint of several files",
    **{f"preprocessing: {name}": value for name, value in preprocessing.items()},
  }
  tags = "tags:\n- image-classification\n" + ("library_name: timm\n" if framework == "timm" else "")
  table = "\n".join(f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows.items())
  use = _USE[framework].format(file=file, network=network, classes=stored.num_classes)
  note = f"\n{remark[0].upper()}{remark[1:]}.\n" if remark else ""
  return f"---\n{tags}---\n# {network}\n\nWritten by `launch.convert`.\n{note}\n| | |\n|-|-|\n{table}\n\n```python\n{use}\n```\n"


def timm_config(name: str, stored: Stored, data: DataConfig) -> str:
  """Returns the config.json with which timm loads a folder or a repository of the hub."""
  known = timm.ARCHITECTURES[name]
  quad = any(path.startswith("stem/conv") for path in stored.arrays)
  size = data.test_image_size or known.test_size
  config: dict[str, Any] = {
    "architecture": name,
    "num_classes": stored.num_classes,
    "num_features": int(stored.arrays["fc/kernel"].shape[0]),
    "pretrained_cfg": {
      "tag": "nfnets",
      "custom_load": False,
      "input_size": [3, known.train_size, known.train_size],
      "test_input_size": [3, size, size],
      "fixed_input_size": False,
      "interpolation": "bicubic",
      "crop_pct": data.test_crop_pct or known.crop_pct,
      "crop_mode": "squash" if data.test_crop == "squash" else "center",
      "mean": [value / 255 for value in data.mean],
      "std": [value / 255 for value in data.std],
      "num_classes": stored.num_classes,
      "pool_size": [-(-known.train_size // 32)] * 2,
      "first_conv": "stem.conv1" if quad else "stem.conv",
      "classifier": "head.fc",
    },
  }
  if stored.class_names:
    config["label_names"] = list(stored.class_names)
  return json.dumps(config, indent=2) + "\n"


_CROPS = {"center": "short_side", "squash": "squash"}  # timm's crop_mode: ours
_LARGEST = 1 << 24  # bytes of a config.json


def read_config(file: pathlib.Path, default: DataConfig, num_classes: int) -> tuple[DataConfig, tuple[str, ...]]:
  """Reads how images are shown, and the classes' names, from the config.json of timm that may lie beside a file of weights.

  Args:
    file: the weights.
    default: the preprocessing where there is no config.json, or for what it leaves out.
    num_classes: of the weights.

  Returns:
    The preprocessing, and the names of the classes, empty where it has none.

  Raises:
    WeightsError: it is none of timm's, or asks for what cannot be done here.
  """
  path = file.with_name("config.json")
  if not path.is_file():
    return default, ()
  try:
    if path.stat().st_size > _LARGEST:
      raise WeightsError(f"{path} has {path.stat().st_size:,} bytes, more than a config.json of timm has")
    content = json.loads(path.read_bytes())
    saved, names = content["pretrained_cfg"], tuple(content.get("label_names") or ())
    size = saved.get("test_input_size") or saved.get("input_size")
    crop, interpolation = saved.get("crop_mode", "center"), saved.get("interpolation", "bicubic")
    data = DataConfig(
      test_crop=_CROPS.get(crop, "none"),
      test_crop_pct=saved.get("test_crop_pct") or saved.get("crop_pct", default.test_crop_pct),
      test_resize="pillow",
      test_image_size=size[-1] if size else default.test_image_size,
      mean=tuple(255 * float(value) for value in saved["mean"]) if "mean" in saved else default.mean,
      std=tuple(255 * float(value) for value in saved["std"]) if "std" in saved else default.std,
    )
    data.validate()
    square = not size or len({*size[1:]}) == 1
  except (OSError, ValueError, ArithmeticError, RecursionError, LookupError, TypeError, AttributeError) as error:
    if isinstance(error, WeightsError):
      raise
    raise WeightsError(f"{path} is no config.json of timm ({type(error).__name__}: {error}); mend it, or move it away") from error
  if crop not in _CROPS or interpolation != "bicubic" or not square:
    raise WeightsError(
      f"{path} asks for crop_mode={crop!r} and interpolation={interpolation!r} of {size}; expected 'center' or 'squash', and "
      "'bicubic' of squares"
    )
  if names and (len(names) != num_classes or not all(isinstance(name, str) for name in names)):
    raise WeightsError(f"{path}: label_names has {len(names):,} entries, expected the names of {num_classes:,} classes")
  return data, names
