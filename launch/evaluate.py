"""Evaluates a checkpoint: python -m launch.evaluate --checkpoint=DIR

DIR is a workdir (its newest checkpoint is taken) or one checkpoint, WORKDIR/checkpoints/STEP. It prints top-1, top-5 and loss
over the whole test split, for the parameters and their average (EMA), as a table and as a last line of JSON. The configuration
is that of the training run, unless --config names a recipe, whose fields --config.FIELD=VALUE changes.
"""

import json

import rich.console
from absl import flags

from launch import cli, recipe


def define(values: flags.FlagValues) -> None:
  recipe.define(values)
  cli.define_processes(values)
  flags.DEFINE_string("checkpoint", None, "A workdir, or WORKDIR/checkpoints/STEP.", flag_values=values)
  flags.DEFINE_boolean("best", False, "Take the best step by the run's own evaluations, not the newest.", flag_values=values)
  flags.DEFINE_boolean("other_class_names", False, "The data may name the classes otherwise; labels count.", flag_values=values)


def run(values: flags.FlagValues) -> int:
  process = cli.start_processes(values)
  config = None if values.config is None else recipe.parse(values)
  if not values.checkpoint:
    raise cli.UsageError("--checkpoint is missing: a workdir, or WORKDIR/checkpoints/STEP")
  cli.check_directory("checkpoint", values.checkpoint, "a workdir, or WORKDIR/checkpoints/STEP")
  from nfnets.train.evaluate import evaluate_checkpoint, results_table

  say = print if process.index == 0 else lambda line: None
  evaluated = evaluate_checkpoint(
    config, values.checkpoint, best=values.best, other_class_names=values.other_class_names, say=say
  )
  if process.index == 0:
    rich.console.Console().print(results_table(evaluated.title, evaluated.results))
    print(json.dumps({"checkpoint": evaluated.path, "step": evaluated.step, **evaluated.results}))
  return 0


if __name__ == "__main__":
  cli.main(run, define, __doc__)
