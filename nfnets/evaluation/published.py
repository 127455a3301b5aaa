"""Accuracies that others published, to stand beside ours; published.json says where they are from."""

import json
import pathlib
from typing import Any

_FILE = pathlib.Path(__file__).with_name("published.json")


def published(model: str, dataset: str, *, classes: int, split: str = "") -> dict[str, Any] | None:
  """Looks up what was published of a network on a data set.

  Args:
    model: the variant's name; "dm_nfnet_f0" is "nfnet_f0", of which DeepMind's weights were published.
    dataset: TFDS's name of a whole data set, such as "imagenet2012" or "imagenet_v2/matched-frequency".
    classes: how many were distinguished; ImageNet-A and -R are published for the 200 that they have.
    split: a split expression; of a part of a split nothing is known.

  Returns:
    {"resolution": pixels, "top1": fraction, "top5": fraction or None, "source": where it was published}; None where nothing was.
  """
  name, _, variant = dataset.partition("/")
  if "[" in split or "+" in split or name == "imagenet_v2" and variant not in ("", "matched-frequency"):
    return None
  table = json.loads(_FILE.read_text(encoding="utf-8"))
  if classes != table["classes"].get(name, 1000):
    return None
  for row in table["rows"]:
    if row["model"] == model.removeprefix("dm_") and name in row["top1"]:
      top5 = row["top5"].get(name)
      return {
        "resolution": row["resolution"],
        "top1": row["top1"][name] / 100,
        "top5": None if top5 is None else top5 / 100,
        "source": table["source"],
      }
  return None
