"""How pictures look: lines that differ in grey too, seeds shaded, axes named with their units, letters for a third of a page."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# Colours of different lightness (the first seven are of Okabe and Ito 2008, without yellow), each with its own dashes and marker.
STYLES = (
  ("#000000", "-", "o"),
  ("#d55e00", "--", "s"),
  ("#0072b2", "-.", "^"),
  ("#009e73", ":", "D"),
  ("#cc79a7", (0, (5, 1)), "v"),
  ("#56b4e9", (0, (3, 1, 1, 1)), "P"),
  ("#8c6d00", (0, (1, 1)), "X"),
  ("#999999", "-", "*"),
  ("#5e2ca5", "--", "<"),
  ("#7a1f1f", "-.", ">"),
)
SIZE = (9.0, 3.6)  # inches, of a picture with two or three panels
DPI = 130
_FONTS = {"font.size": 11, "axes.titlesize": 11, "axes.labelsize": 11, "legend.fontsize": 9}


def render(draw: Any, size: tuple[float, float] = SIZE) -> bytes:
  """Draws into a new figure and returns it as a PNG; the background is white, also where the page around it is dark."""
  import io

  import matplotlib
  from matplotlib.figure import Figure

  with matplotlib.rc_context(_FONTS):
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    draw(figure)
    image = io.BytesIO()
    figure.savefig(image, dpi=DPI, format="png")
  return image.getvalue()


def line(axis: Any, x: Sequence[float] | np.ndarray, values: Any, label: str, style: int, *, markers: bool = False) -> None:
  """Draws the mean over seeds, and their range as a shade.

  Args:
    axis: of matplotlib.
    x: [points].
    values: [seeds, points].
    label: for the legend; "" for none.
    style: which of STYLES.
    markers: whether each point gets a mark; else a few of them do.
  """
  values = np.atleast_2d(np.asarray(values, np.float64))
  x = np.asarray(x)
  color, dashes, marker = STYLES[style % len(STYLES)]
  every = 1 if markers else max(1, len(x) // 6)
  offset = 0 if markers else (style * every // len(STYLES)) % every
  marks: Any = (offset, every)
  axis.plot(x, values.mean(axis=0), color=color, ls=dashes, marker=marker, markevery=marks, ms=4.5, lw=1.6, label=label or None)
  if len(values) > 1:
    axis.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, lw=0)


def name_axes(axis: Any, x: str, y: str, title: str = "") -> None:
  """Names the axes, with units, and puts the title at the left; draws a light grid."""
  axis.set_xlabel(x)
  axis.set_ylabel(y)
  axis.set_title(title, loc="left")
  axis.grid(color="0.9", lw=0.6)
  axis.set_axisbelow(True)
  for side in ("top", "right"):
    axis.spines[side].set_visible(False)


def legend(axis: Any, **where: Any) -> None:
  """A legend without a frame, whose lines are long enough to tell dashes apart."""
  axis.legend(frameon=False, handlelength=2.6, **where)
