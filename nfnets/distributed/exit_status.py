"""The exit statuses by which a run asks to be started again, and the rule that launchers follow."""

import signal

STOPPED = 75  # a signal asked the run to stop, and it has saved
LOST = 76  # the run hung, or another process of it was lost


def should_restart(status: int) -> bool:
  """Says whether a launcher runs the same command again after exit `status`, as a shell counts (128 + the signal's number).

  Yes after STOPPED, LOST and death by a signal; no after success, failure (1), a person's mistake (2) and Ctrl-C (130).
  launch/pods/slurm.sbatch and jobset.yaml hold the same rule for their schedulers; a test compares them.
  """
  return status in (STOPPED, LOST) or (status > 128 and status != 128 + signal.SIGINT)
