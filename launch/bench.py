"""Measures speed:
  python -m launch.bench step --config=configs/synthetic.py:nfnet_f0 [--without-agc] [--profile=DIR]
  python -m launch.bench step --config=configs/synthetic.py:nfnet_f0 --peer=timm [--peer_compile] [--rounds=3]
  python -m launch.bench step --config=configs/synthetic.py:nfnet_f0 --peer=haiku --official=DIR
  python -m launch.bench sweep --config=configs/synthetic.py --models=nfnet_f0,nfnet_f1 [--batches=128,256] [--minutes=10]
  python -m launch.bench agc --config=configs/synthetic.py:nfnet_f0 [--rounds=3] [--steps=50]
  python -m launch.bench data --config=configs/nfnet.py:F0 [--against=tf.data] [--images=4000] [--rounds=3]

step: times the compiled training step, on synthetic images that already lie on the devices. It prints the times of
initialising, lowering and compiling, milliseconds a step, images/s, FLOPs, MFU and memory, then all of it as one line of JSON;
docs/speed.md says how to read it. --profile=DIR also saves a trace of ten steps and prints what took the most of their time.
step --peer: times our step on one device and, in turn, the same work by timm in PyTorch or by the official release in Haiku (the
directory DIR holds its nfnets/), each side in a process of its own. It prints both and the ratio with its spread over the rounds.
sweep: for a GPU that is at hand for ten minutes: checks a step in bfloat16 against float32, then times ours and timm's at each
batch size, and timm's compiled and in its other layout of memory; prints a table of each side's best. --minutes bounds it, --json
holds what was measured so far.
agc: times the clipping of a network's gradients by nfnets.agc, by optax.adaptive_grad_clip, and SGD with either and with none.
data: times how training images are made ready on the host, each pipeline in a process of its own, in turn. It prints images/s,
images per CPU-second, the time to the first batch, memory, and what the time is spent on; the last line is JSON.
--against=tf.data measures two tf.data pipelines too, one tuned for decoding alone and one with the structure of the official
recipe.
"""

import dataclasses

import rich.table
from absl import flags

from launch import cli, recipe
from launch.progress import meter, plain_console, table_console
from nfnets.config import Config


def define(values: flags.FlagValues) -> None:
  recipe.define(values)
  whole = lambda name, default, text: flags.DEFINE_integer(name, default, text, lower_bound=1, flag_values=values)
  whole("batch", None, "Images a step, over all devices, instead of config.batch (step); images a batch instead of 64 (data).")
  whole("image_size", None, "step: pixels a side, instead of config.data.image_size and of the model's training resolution.")
  whole("classes", None, "step: classes of the network, instead of config.data.num_classes and of what the dataset has.")
  whole("steps", 50, "step, agc: timed steps, first one by one (step) and then as many in a row.")
  whole("warmup", 5, "step, agc: steps before these that are not timed.")
  flags.DEFINE_boolean("without_agc", False, "step: also time the step without AGC, alternating with it.", flag_values=values)
  flags.DEFINE_alias("without-agc", "without_agc", flag_values=values)
  whole("images", 4000, "data: images that each pipeline makes in a round, rounded up to whole batches.")
  whole("rounds", 3, "data, agc, step --peer: times that each side is measured, in turn; the medians are shown.")
  whole("threads", None, "data: threads that decode, instead of config.data.threads or, unset, one for each core.")
  flags.DEFINE_enum("against", None, ["tf.data"], "data: what to measure beside nfnets' own pipeline.", flag_values=values)
  flags.DEFINE_enum("peer", None, ["timm", "haiku"], "step: whose step to time beside ours, on one device.", flag_values=values)
  flags.DEFINE_string(
    "official",
    None,
    "step, --peer=haiku: the directory that holds nfnets/ of google-deepmind/deepmind-research.",
    flag_values=values,
  )
  flags.DEFINE_boolean("peer_compile", False, "step, --peer=timm: let torch.compile compile the network.", flag_values=values)
  flags.DEFINE_list("models", None, "sweep: names of networks, instead of the configuration's.", flag_values=values)
  flags.DEFINE_list("batches", ["256", "512"], "sweep: images a step, from small to large.", flag_values=values)
  flags.DEFINE_float(
    "minutes",
    10.0,
    "sweep: for all networks, which share it; no stage begins that would end later.",
    lower_bound=0.0,
    flag_values=values,
  )
  flags.DEFINE_string("profile", None, "step: a directory for a profiler's trace of ten steps.", flag_values=values)
  flags.DEFINE_string("json", None, "A file to write the JSON to as well.", flag_values=values)


def run(values: flags.FlagValues, *arguments: str) -> int:
  return cli.run_subcommand(SUBCOMMANDS, values, arguments, "python -m launch.bench NAME --config=configs/synthetic.py:nfnet_f0")


def _config(values: flags.FlagValues) -> Config:
  """The recipe with --batch, --image_size and --classes."""
  config = recipe.parse(values)
  if values.batch is not None:
    config = dataclasses.replace(config, batch=values.batch)
  if values.image_size is not None:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=values.image_size))
  if values.classes is not None:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_classes=values.classes))
  return config


def step(values: flags.FlagValues) -> int:
  config = _config(values)
  _check_peer(values)
  if values.profile:
    cli.check_directory("profile", values.profile, "a directory for the trace")
  file = cli.writable("json", values.json)
  say = lambda line: print(line, flush=True)
  counts = {"steps": values.steps, "warmup": values.warmup}
  if values.peer:
    from nfnets.measure import peers

    sides = {"official": values.official, "torch_compile": values.peer_compile}
    report = peers.compare(config, values.peer, rounds=values.rounds, **counts, **sides, say=say)
  else:
    from nfnets.measure.step import benchmark_step

    report = benchmark_step(config, **counts, without_agc=values.without_agc, profile=values.profile, say=say)
  print(f"\n{report}\n")
  cli.hand_out(report.to_json(), file)
  return 0


def _check_peer(values: flags.FlagValues) -> None:
  """Raises UsageError for flags that do not go together with --peer, or not without it."""
  if values.peer and values.without_agc:
    raise cli.UsageError(f"--without-agc and --peer={values.peer} are two benchmarks; run them one after the other")
  if values.peer and values.profile:
    raise cli.UsageError(f"--profile traces our step alone; leave --peer={values.peer} out")
  if values.official and values.peer != "haiku":
    raise cli.UsageError("--official is the directory of --peer=haiku's code; give both or neither")
  if values.peer_compile and values.peer != "timm":
    raise cli.UsageError("--peer_compile compiles timm's network in PyTorch; give --peer=timm with it")


def sweep(values: flags.FlagValues) -> int:
  if bad := [text for text in values.batches if not text.isdigit() or int(text) < 1]:
    raise cli.UsageError(f"--batches: expected positive whole numbers, got {bad[0]!r}")
  config = _config(values)
  named = lambda name: dataclasses.replace(config, model=dataclasses.replace(config.model, name=name))
  configs = [named(name) for name in values.models] if values.models else [config]
  file = cli.writable("json", values.json)
  from nfnets.measure import sweep as measure

  report = measure.sweep(
    configs,
    batches=sorted(int(text) for text in values.batches),
    minutes=values.minutes,
    steps=values.steps,
    rounds=values.rounds,
    file=file,
    say=lambda line: print(line, flush=True),
  )
  print_sweep(report)
  cli.hand_out(report, file)
  return 0


def print_sweep(report: dict) -> None:
  """Prints the best of each side, a row a network."""
  table = rich.table.Table(
    "network", "ours, images/s", "batch", "timm, images/s", "batch", "timm ran", "ours / timm", title=report["device"]
  )
  for name, best in report["best"].items():
    if best is None:
      table.add_row(name, "nothing ran", *[""] * 5)
      continue
    ours, theirs = best["ours"], best["theirs"]
    sides = [f"{ours['images_per_s']:,.1f}", str(ours["batch"]), f"{theirs['images_per_s']:,.1f}", str(theirs["batch"])]
    table.add_row(name, *sides, theirs["way"], f"× {best['ratio']:.2f}")
  table_console().print(table)


def agc(values: flags.FlagValues) -> int:
  _refuse_steps_flags(values, "agc")
  config = _config(values)
  file = cli.writable("json", values.json)
  from nfnets.measure.clipping import compare_clipping

  say = lambda line: print(line, flush=True)
  report = compare_clipping(config, rounds=values.rounds, steps=values.steps, warmup=values.warmup, say=say)
  table_console().print(report.table())
  print(report)
  cli.hand_out(report.to_json(), file)
  return 0


def _refuse_steps_flags(values: flags.FlagValues, name: str) -> None:
  """Raises UsageError for flags of the subcommand step that `name` would pass over."""
  for flag in ("peer", "official", "peer_compile", "profile", "without_agc"):
    if values[flag].value:
      raise cli.UsageError(f"--{flag} belongs to the subcommand step, not to {name}")


def data(values: flags.FlagValues) -> int:
  _refuse_steps_flags(values, "data")
  config = recipe.parse(values)
  file = cli.writable("json", values.json)
  from nfnets.data.batches.prefetch import cores
  from nfnets.measure import data as data_benchmark, tfdata
  from nfnets.measure.data_report import RECIPE, Measured, Measurement

  if values.against and tfdata.missing():
    raise cli.UsageError("--against=tf.data needs TensorFlow: pip install 'nfnets[peers]' (or tensorflow-cpu)")
  from nfnets.data.sources.open import open_source
  from nfnets.train import resolve

  console = plain_console()
  filled = resolve.data_config(config)
  # opened once before anything is timed, so that its errors are seen and its index is built
  open_source(filled, filled.train_split, progress=console.print).close()
  if values.against:
    tfdata.check(filled)
  jobs = data_benchmark.measurements(
    filled,
    batch=values.batch or 64,
    images=values.images,
    seed=config.seed,
    threads=values.threads or filled.threads or cores(),
    against=bool(values.against),
  )
  with meter(console, "measuring", values.rounds * len(jobs), "measurements") as progress:

    def show(number: int, job: Measurement, result: Measured | None) -> None:
      if result is not None:
        progress.advance(1)
        console.print(
          f"round {number + 1}/{values.rounds}  {job.pipeline}, {job.group}: {result.figures['images_per_s']:,.0f} images/s"
        )

    report = data_benchmark.compare(jobs, rounds=values.rounds, progress=show)
  table_console().print(report.table())
  for ratio in report.ratios:
    console.print(str(ratio))
  if values.against and len(report.ratios) == 1:
    console.print(
      f"{RECIPE}: no tf.data pipeline for config.data.mix={filled.mix}, augment={filled.augment}, "
      f"augment_before_mix={filled.augment_before_mix}; the official structure mixes up and cuts, then RandAugment"
    )
  cli.hand_out(report.to_json(), file)
  return 0


SUBCOMMANDS = {"step": step, "sweep": sweep, "agc": agc, "data": data}


if __name__ == "__main__":
  cli.main(run, define, __doc__, arguments=True)
