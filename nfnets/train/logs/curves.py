"""The picture of a run: loss, accuracy, learning rate and clip fraction."""

import io
from typing import Any

import numpy as np


def draw_curves(records: list[dict[str, Any]], train_label: str = "train") -> bytes:
  """A PNG of loss, accuracy, learning rate, and clip fraction by layer, over epochs, from the records of metrics.jsonl."""
  from matplotlib.figure import Figure

  train = [record for record in records if record["kind"] == "train"]
  test = [record for record in records if record["kind"] == "test"]
  column = lambda rows, key: [np.nan if row[key] is None else row[key] for row in rows if key in row]
  figure = Figure(figsize=(11, 7.5), layout="constrained")
  (loss, accuracy), (rate, clip) = figure.subplots(2, 2)
  for axis, key, title in ((loss, "loss", "cross-entropy"), (accuracy, "top1", "top-1 accuracy")):
    axis.plot(column(train, "epoch"), column(train, key), color="0.6", lw=1, label=train_label if key == "loss" else "train")
    for prefix, color, name in (("", "C0", "test"), ("ema_", "C1", "test, EMA")):
      if column(test, prefix + key):
        values = column(test, prefix + key)
        last = f"{values[-1]:.2%}" if key == "top1" else f"{values[-1]:.3f}"
        axis.plot(column(test, "epoch"), values, color=color, marker="." if len(values) < 40 else None, label=f"{name} ({last})")
    axis.set_title(title, loc="left")
    axis.legend()
  rate.plot(column(train, "epoch"), column(train, "lr"), color="C2")
  rate.set_title("learning rate", loc="left")
  clipped = [record for record in train if record.get("clip")]
  if clipped:
    layers = list(clipped[-1]["clip"])
    grid = np.array([[record["clip"].get(layer, np.nan) for record in clipped] for layer in layers])
    extent = (clipped[0]["epoch"], max(clipped[-1]["epoch"], clipped[0]["epoch"] + 1e-6), len(layers) - 0.5, -0.5)
    image = clip.imshow(grid, aspect="auto", interpolation="nearest", vmin=0, vmax=1, cmap="magma", extent=extent)
    every = max(1, len(layers) // 16)
    clip.set_yticks(range(0, len(layers), every), layers[::every], fontsize=7)
    figure.colorbar(image, ax=clip, label="share of units clipped")
  else:
    clip.text(0.5, 0.5, "AGC was not tracked (config.optim.agc_track)", ha="center", transform=clip.transAxes)
  clip.set_title("clip fraction by layer (kernels)", loc="left")
  for axis in (loss, accuracy, rate, clip):
    axis.set_xlabel("epoch")
  image = io.BytesIO()
  figure.savefig(image, dpi=110, format="png")
  return image.getvalue()
