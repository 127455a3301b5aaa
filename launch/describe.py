"""Describes a network: python -m launch.describe nfnet_f0 [--num_classes=1000] [--norm=group:8]; without a name, lists all."""

from absl import flags

from launch import cli


def define(values: flags.FlagValues) -> None:
  flags.DEFINE_integer("num_classes", 1000, "Classes of the classifier.", flag_values=values)
  flags.DEFINE_string("norm", None, "The normalizer of a ResNet, such as group:8, dyt or nf.", flag_values=values)


def run(values: flags.FlagValues, *names: str) -> int:
  from nfnets import models

  if not names:
    print("\n".join(models.names()))
  for name in names:
    print(models.describe(name, values.num_classes, **({} if values.norm is None else {"norm": values.norm})))
  return 0


if __name__ == "__main__":
  cli.main(run, define, __doc__, arguments=True)
