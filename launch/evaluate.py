"""Evaluates a checkpoint: python -m launch.evaluate --config=configs/digits.py --checkpoint=DIR

DIR is a workdir (its newest checkpoint is taken) or one checkpoint, WORKDIR/checkpoints/STEP. Prints top-1, top-5 and loss over
the whole test split, for the parameters and their average (EMA), as a table and as a last line of JSON.
"""

import json
import pathlib

import jax
import rich.console
from absl import flags
from flax import nnx

from launch import cli


def define(values: flags.FlagValues) -> None:
  cli.define_config(values)
  cli.define_processes(values)
  flags.DEFINE_string("checkpoint", None, "A workdir, or WORKDIR/checkpoints/STEP.", flag_values=values)


def run(values: flags.FlagValues) -> int:
  process = cli.start_processes(values)
  config = cli.parse_config(values)
  if not values.checkpoint:
    raise cli.UsageError("--checkpoint is missing: a workdir, or WORKDIR/checkpoints/STEP")
  from nfnets.data.batches.evaluation import EvalBatches
  from nfnets.data.sources.open import open_source
  from nfnets.train import evaluate, resolve
  from nfnets.train.checkpoints import compatibility, retention
  from nfnets.train.checkpoints.store import Checkpoints
  from nfnets.train.step import sharding
  from nfnets.train.step.state import build_network, split_network
  from nfnets.train.step.step import eval_step_over

  where = pathlib.Path(values.checkpoint).resolve()
  checkpoints, (_, step) = Checkpoints(str(where)), retention.locate(str(where))
  step = checkpoints.choose(step) if step is None or checkpoints.path(step).is_dir() else None
  if step is None:
    raise cli.UsageError(f"--checkpoint={where}: no checkpoint there; give a workdir that training has written to")
  compatibility.check_same_run(
    checkpoints.meta(step)["config"], config, str(where), only=("model.", "data.mean", "data.std", "loss")
  )
  data_config = resolve.data_config(config)
  data = open_source(data_config, data_config.test_split, progress=print if process.index == 0 else lambda line: None)
  mesh = sharding.make_mesh()
  batches = EvalBatches(
    data, data_config, batch=sharding.whole_batch(config.eval_batch, mesh), process=(process.index, process.count)
  )
  graph, params, stats = split_network(nnx.eval_shape(lambda: build_network(config.model, data.num_classes)))
  weights = checkpoints.restore_model(step, *sharding.place(mesh, (params, stats)))
  step_over_mesh = eval_step_over(config, mesh, graph)
  results = evaluate.evaluate(step_over_mesh, mesh, weights, batches)
  for each in (batches, data, checkpoints):
    each.close()
  if process.index:
    return 0
  title = (
    f"{config.model.name}, step {step:,}, {config.data.name} {config.data.test_split} split, "
    f"{mesh.size} × {jax.devices()[0].device_kind}"
  )
  rich.console.Console().print(evaluate.results_table(title, results))
  print(json.dumps({"checkpoint": str(checkpoints.path(step)), "step": step, **results}))
  return 0


if __name__ == "__main__":
  cli.main(run, define, __doc__)
