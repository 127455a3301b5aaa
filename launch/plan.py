"""Tells what a training step takes, before there is a machine:
  python -m launch.plan --config=configs/nfnet.py:F0 --topology=v5e:16x16

Compiles the step that launch.train would run for a TPU slice (v5e:2x4, v5e:16x16, v4:2x2x2, v5p:2x2x2, v6e:4x4 …; it needs
libtpu, but no TPU: pip install 'jax[tpu]') or, without --topology, for this machine's own devices. Prints the memory of a
device and whether it suffices, arithmetic, what the devices send each other, the compile time, and an estimated time of a step
with its assumptions; the last line is JSON. Where it does not fit, remat, sharding and accumulation are compiled as well, until
something does; --advise compiles all of them; --top=20 lists the operations that move the most, with their layers. docs/plan.md
says how to read it.
"""

import contextlib
import dataclasses

import jax
from absl import flags

from launch import cli, recipe
from launch.progress import table_console


def define(values: flags.FlagValues) -> None:
  recipe.define(values)
  flags.DEFINE_string(
    "topology", None, "A TPU slice, KIND:SHAPE in chips, e.g. v5e:16x16, instead of this machine's devices.", flag_values=values
  )
  flags.DEFINE_integer(
    "classes",
    None,
    "Classes of the network; instead of config.data.num_classes and of what the dataset has.",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_boolean(
    "advise", False, "Also compile with remat, shard and accumulate=2, 4, 8 where the step fits without them.", flag_values=values
  )
  flags.DEFINE_integer("top", 0, "Also list so many operations with the most memory traffic.", lower_bound=0, flag_values=values)
  flags.DEFINE_string("json", None, "A file to write the JSON to as well.", flag_values=values)
  flags.DEFINE_string("out", None, "A picture (PNG, PDF, SVG) of the memory of everything that was compiled.", flag_values=values)


def run(values: flags.FlagValues) -> int:
  config = recipe.parse(values)
  if values.classes is not None:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_classes=values.classes))
  json_file, picture_file = (cli.writable(flag, values[flag].value) for flag in ("json", "out"))
  if values.topology is not None:
    with contextlib.suppress(RuntimeError):  # raised where JAX has already started
      jax.config.update("jax_platforms", "cpu")  # only shapes are made, so a local TPU or GPU is left to others
  from nfnets.measure import traffic
  from nfnets.measure.plan import make_plan
  from nfnets.measure.plan_report import picture

  plan = make_plan(
    config, topology=values.topology, advise=values.advise, top=values.top, say=lambda line: print(line, flush=True)
  )
  console = table_console()
  print()
  console.print(plan.table())
  if len(plan.steps) > 1:
    print()
    console.print(plan.variants())
  for step in plan.steps if values.top else ():
    if step.operations:
      print(f"\n{step.name}")
      console.print(traffic.table(step.operations, values.top))
  print(f"\nadvice: {plan.advice}\n\nassumed:")
  for note in plan.assumptions():
    print(f"- {note}")
  print()
  if picture_file is not None and len(plan.steps) > 1:
    picture(plan, str(picture_file))
    print(f"drawn: {picture_file}")
  elif picture_file is not None:
    picture_file.unlink()
    print("drawn: nothing, only one step was compiled (see --advise)")
  cli.hand_out(plan.to_json(), json_file)
  return 0


if __name__ == "__main__":
  cli.main(run, define, __doc__)
