"""The texts that stand beside converted weights: a model card, and the config.json that timm reads."""

import json
from typing import Any

from nfnets.config import DataConfig
from nfnets.weights import timm
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
      "crop_pct": known.crop_pct,
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
