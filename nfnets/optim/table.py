"""The parameter groups as a table for people."""

from collections.abc import Sequence
from typing import Any

from nfnets.config import OptimConfig
from nfnets.optim.depth import layer_rates
from nfnets.optim.groups import ParameterGroup, clips, default_groups, leaves, listing, parameter_groups


def describe_groups(params: Any, config: OptimConfig, groups: Sequence[ParameterGroup] | None = None) -> str:
  """A table of the parameter groups for the start of a run: patterns, tensors, parameters, weight decay, AGC clipping.

  With layer-wise learning rates or frozen parameters, a further column has the smallest and the largest factor of a group's
  learning rates. Arguments and errors are those of `make_optimizer`.
  """
  groups = default_groups(params, config) if groups is None else groups
  owners, rates = parameter_groups(params, groups), layer_rates(params, config)
  sizes = {path: size for path, _, size in leaves(params)}
  rows = [("group", "patterns", "tensors", "parameters", "weight decay", "AGC clipping", "learning rate")]
  for group in groups:
    paths = [path for path, owner in owners.items() if owner == group]
    factors = sorted({rates[path] for path in paths})
    ends = dict.fromkeys((f"{factors[0]:.3g}", f"{factors[-1]:.3g}"))
    rows.append(
      (
        group.name,
        listing(group.patterns, limit=2) + (f" but not {listing(group.but_not, limit=2)}" if group.but_not else ""),
        f"{len(paths):,}",
        f"{sum(sizes[path] for path in paths):,}",
        f"{config.weight_decay:g}" if group.decay else "0",
        f"{config.clipping:g}" if group.clip and clips(config) else "off",
        "0" if group.frozen else f"× {'…'.join(ends)}",
      )
    )
  rows.append(("all", "", f"{len(sizes):,}", f"{sum(sizes.values()):,}", "", "", ""))
  columns = 7 if config.layer_decay != 1 or any(group.frozen for group in groups) else 6
  widths = [max(len(row[column]) for row in rows) for column in range(columns)]
  align = (str.ljust, str.ljust, *[str.rjust] * (columns - 2))
  return "\n".join(
    "  ".join(fit(cell, width) for fit, cell, width in zip(align, row[:columns], widths, strict=True)).rstrip() for row in rows
  )
