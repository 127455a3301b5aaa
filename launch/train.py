"""Trains a network: python -m launch.train --config=configs/digits.py --workdir=DIR

Prints what of the configuration differs from the defaults, the parameter groups and the devices, then progress; DIR gets
checkpoints, metrics.jsonl, tensorboard/ and curves.png. Ctrl-C or SIGTERM saves and ends with status 75; the same command goes
on from there. With --config, --help lists every field of the configuration.

On several machines, or for several processes on one, see docs/pods.md.
"""

from absl import flags

from launch import cli, compiled, recipe
from nfnets import distributed


def define(values: flags.FlagValues) -> None:
  recipe.define(values)
  cli.define_processes(values)
  compiled.define(values)
  flags.DEFINE_string("workdir", None, "Where the run lives; a run found there is continued.", flag_values=values)


def run(values: flags.FlagValues) -> int:
  cli.start_processes(values)
  compiled.keep(values)
  config = recipe.parse(values)
  workdir = cli.parse_workdir(values)
  from nfnets.train import loop

  return 0 if loop.train(config, workdir).finished else distributed.STOPPED


if __name__ == "__main__":
  cli.main(run, define, __doc__)
