"""The training loop: from a configuration and a workdir to a trained network, resumable at any step."""

import contextlib
import dataclasses
import enum

import jax

from nfnets.config import Config
from nfnets.distributed.signals import stop_on_signals
from nfnets.distributed.watchdog import FIRST_STEP_S
from nfnets.train import recovery
from nfnets.train.evaluate import Results, results_table
from nfnets.train.logs.profile import StepTracer
from nfnets.train.logs.window import Window, summarize
from nfnets.train.recovery import NonFiniteError
from nfnets.train.run import Run, open_run

__all__ = ["NonFiniteError", "Result", "train"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
  """What `train` hands back. results: the last evaluation, {"params": {"top1", …}, "ema": …}; empty if it was interrupted."""

  step: int
  finished: bool
  results: Results


class Ended(enum.Enum):
  """Why `_take_steps` came back."""

  FINISHED = enum.auto()
  STOPPED = enum.auto()  # by a signal, after saving
  ROLLED_BACK = enum.auto()  # to the last checkpoint, to go on from there


def train(config: Config, workdir: str, *, profile: str | None = None) -> Result:
  """Trains as `config` says, from the newest good checkpoint in `workdir` if there is one.

  Writes checkpoints, metrics.jsonl, tensorboard/, curves.png and config.json into `workdir`. SIGINT and SIGTERM, to one process
  or all, save and return. With `profile`, process 0 writes a trace of its steps 11 to 20 into that directory, and says
  what took the most of their time.

  Raises:
    UserError: with its kinds DataError, CheckpointError, ProcessError, WorkdirInUse and the models' own: a person can mend it.
    NonFiniteError: a loss, gradient or update was not finite, and config.on_bad_step says to stop.
  """
  with open_run(config, workdir) as run:
    with stop_on_signals() as run.stop:
      results, ended = None, Ended.ROLLED_BACK
      if _evaluation_is_missing(run):
        results = _make_up_evaluation(run)
        ended = Ended.ROLLED_BACK if results else Ended.STOPPED  # a signal again: its step is saved, and stays the newest
      with StepTracer(profile if jax.process_index() == 0 else None, run.log.say) as tracer:
        while ended is Ended.ROLLED_BACK:
          ended, results = _take_steps(run, results, tracer)
      if ended is Ended.FINISHED and not results:  # resumed at the end
        results = run.evaluate()
        ended = Ended.FINISHED if results else Ended.STOPPED
      run.watchdog.expect("the last checkpoint")
      run.writer.wait()  # while signals are still ours: the last write must not be lost to one
    _say_goodbye(run, results)
    return Result(step=run.step, finished=ended is Ended.FINISHED, results=results or {})


def _take_steps(run: Run, results: Results | None, tracer: StepTracer) -> tuple[Ended, Results | None]:
  """Steps until the end, a signal or a rollback; and the last evaluation, `results` if there was none."""
  config = run.config
  run.watchdog.expect(f"the images of step {run.step + 1}")
  with contextlib.closing(Window()) as window, contextlib.closing(run.batches_from_here()) as ahead:
    for batch in window.batches(ahead):
      if not run.has_compiled:
        run.watchdog.expect("the first step", FIRST_STEP_S)
      run.wait_for_room()
      stopping = run.is_stopping()
      tracer.before_step(run.state)
      window.add(run.take_step(batch))
      if not run.has_compiled:
        _wait_for_compilation(run, window)

      evaluation_due, save_due = run.is_due(config.eval_every), run.is_due(config.checkpoint_every)
      if run.step % config.log_every == 0 or evaluation_due or save_due or stopping:
        jax.block_until_ready(window.metrics[-1])
        if bool(run.state.halted):
          recovery.handle_halt(run, jax.device_get(window.metrics))
          return Ended.ROLLED_BACK, results
        _report(run, window)

      if evaluation_due and not stopping:
        results = run.evaluate()
        stopping = results is None
      if save_due or stopping:
        run.save(results if evaluation_due else None)
      if stopping:
        return Ended.STOPPED, None
      if evaluation_due or save_due:
        window.restart_clock()
  return Ended.FINISHED, results


def _evaluation_is_missing(run: Run) -> bool:
  """Whether a signal came before the evaluation that was due at the step that the run goes on from."""
  return run.resumed_from is not None and run.is_due(run.config.eval_every) and not run.reader.evaluated(run.step)


def _make_up_evaluation(run: Run) -> Results | None:
  """Evaluates the step that the run goes on from, and notes it in its checkpoint; None where a signal ended it."""
  results = run.evaluate()
  if results is not None:
    run.writer.add_metrics(run.step, results)
  return results


def _wait_for_compilation(run: Run, window: Window) -> None:
  """The first step compiles: it is waited for, and left out of the time that a step takes."""
  jax.block_until_ready(window.metrics[-1])
  run.has_compiled = True
  run.watchdog.expect(f"step {run.step + 1}")
  run.log.say(f"compiled in {window.exclude_steps_so_far():.0f} s")


def _report(run: Run, window: Window) -> None:
  """Logs the steps since the last line. Raises NonFiniteError or DataError where too much went wrong in them."""
  seconds, waiting = window.seconds_per_step(), window.waiting_share()
  metrics = jax.device_get(window.metrics)
  run.note_corrupt(metrics)
  scalars, clip_by_layer = summarize(run.config, run.state, metrics, run.schedule, run.steps_per_epoch)
  if seconds:
    scalars["images_per_second"] = run.config.batch / seconds
  if run.corrupt:
    scalars["corrupt_records"] = len(run.corrupt)
  run.log.train(run.step, {**scalars, "data_wait": waiting}, clip_by_layer, seconds)
  window.clear()
  recovery.check_bad_steps(run, metrics)
  run.check_corrupt()


def _say_goodbye(run: Run, results: Results | None) -> None:
  """Draws the picture, and says how the run ended. results: None where it was stopped."""
  picture = run.log.draw()
  if results is not None:
    title = f"{run.config.model.name} on {run.config.data.name}, {run.config.data.test_split} split"
    run.log.console.print(results_table(title, results))
  else:
    run.log.say(
      f"stopped by {run.stop.name or 'a signal to another process'} at step {run.step} of {run.total_steps}; saved "
      f"{run.reader.path(run.step)}; the same command goes on from there"
    )
  run.log.say(f"in {run.workdir}: metrics.jsonl, tensorboard/, checkpoints/{', ' + picture.name if picture else ''}")
