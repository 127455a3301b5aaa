"""Measures speed: python -m launch.bench step --config=configs/synthetic.py:nfnet_f0 [--without-agc]

step: the compiled training step, on synthetic images that already lie on the devices. Prints the times of initialising,
lowering and compiling, ms a step, images/s, FLOPs, MFU and memory, then all of it as one line of JSON; docs/speed.md
says how to read it.
"""
import dataclasses
import difflib
import json
import pathlib

from absl import flags

from launch import cli


def define(values: flags.FlagValues) -> None:
  cli.define_config(values)
  whole = lambda name, default, text: flags.DEFINE_integer(name, default, text, lower_bound=1, flag_values=values)
  whole("batch", None, "Images a step, over all devices; instead of config.batch.")
  whole("image_size", None, "Pixels a side; instead of config.data.image_size and of the model's training resolution.")
  whole("steps", 50, "Timed steps, one by one and then again in a row.")
  whole("warmup", 5, "Steps before these that are not timed.")
  flags.DEFINE_boolean("without_agc", False, "Also time the step without AGC, in turn with the one with it.",
                       flag_values=values)
  flags.DEFINE_alias("without-agc", "without_agc", flag_values=values)
  flags.DEFINE_string("json", None, "A file to write the JSON to as well.", flag_values=values)


def run(values: flags.FlagValues, *arguments: str) -> int:
  what, *rest = arguments or ("nothing",)
  if what not in SUBCOMMANDS:
    near = difflib.get_close_matches(what, SUBCOMMANDS, n=1) or list(SUBCOMMANDS)
    raise cli.UsageError(f"what to measure: got {what}, expected: {', '.join(near)}; e.g. python -m launch.bench "
                         f"{near[0]} --config=configs/synthetic.py:nfnet_f0")
  if rest:
    raise cli.UsageError(f"unexpected argument {rest[0]!r}; flags look like --name=value")
  return SUBCOMMANDS[what](values)


def step(values: flags.FlagValues) -> int:
  config = cli.parse_config(values)
  if values.batch is not None:
    config = dataclasses.replace(config, batch=values.batch)
  if values.image_size is not None:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=values.image_size))
  file = _json_file(values.json)
  from nfnets.train import benchmark
  report = benchmark.benchmark_step(config, steps=values.steps, warmup=values.warmup, without_agc=values.without_agc,
                                    say=lambda line: print(line, flush=True))
  print(f"\n{report}\n")
  line = json.dumps(report.to_json())
  print(line)
  if file is not None:
    file.write_text(f"{line}\n", encoding="utf-8")
  return 0


def _json_file(name: str | None) -> pathlib.Path | None:
  """The file, found fit to be written before minutes are spent."""
  if name is None:
    return None
  file = pathlib.Path(name)
  try:
    with file.open("a", encoding="utf-8"):
      return file
  except OSError as error:
    raise cli.UsageError(f"--json={name}: {error.strerror}") from error


SUBCOMMANDS = {"step": step}


if __name__ == "__main__":
  cli.main(run, define, __doc__, arguments=True)
