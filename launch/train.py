"""Trains a network: python -m launch.train --config=configs/digits.py --workdir=DIR

Prints the resolved configuration, the parameter groups and the devices, then progress; DIR gets checkpoints, metrics.jsonl,
tensorboard/ and curves.png. Ctrl-C or SIGTERM saves and ends; the same command goes on from there.
"""
from absl import flags

from launch import cli


def define(values: flags.FlagValues) -> None:
  cli.define_config(values)
  flags.DEFINE_string("workdir", None, "Where the run lives; a run found there is continued.", flag_values=values)


def run(values: flags.FlagValues) -> int:
  config = cli.parse_config(values)
  workdir = cli.parse_workdir(values)
  from nfnets.train import loop
  loop.train(config, workdir)
  return 0


if __name__ == "__main__":
  cli.main(run, define, __doc__)
