"""Trains a network: python -m launch.train --config=configs/digits.py --workdir=DIR

Prints what of the configuration differs from the defaults, the parameter groups and the devices, then progress; DIR gets
checkpoints, metrics.jsonl, tensorboard/ and curves.png. Ctrl-C or SIGTERM saves and ends with status 75; the same command goes
on from there. --profile=DIR traces ten steps. With --config, --help lists every field of the configuration.

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
  flags.DEFINE_string(
    "profile",
    None,
    "A directory for a profiler's trace of steps 11 to 20 of this process; prints what took most.",
    flag_values=values,
  )


def run(values: flags.FlagValues) -> int:
  cli.start_processes(values)
  compiled.keep(values)
  config = recipe.parse(values)
  workdir = cli.parse_workdir(values)
  if values.profile:
    cli.check_directory("profile", values.profile, "a directory for the trace")
  from nfnets.train import loop

  return 0 if loop.train(config, workdir, profile=values.profile).finished else distributed.STOPPED


if __name__ == "__main__":
  cli.main(run, define, __doc__)
