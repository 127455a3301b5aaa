"""The programs, run as `python -m launch.NAME`: they read flags and return an exit status; what they do lies in nfnets."""

import os
import sys
from collections.abc import Mapping, Sequence


def with_huge_pages(command: Sequence[str], environment: Mapping[str, str]) -> dict[str, str] | None:
  """Returns the environment in which to start a program again, so that glibc's malloc asks Linux for huge pages.

  On CPUs XLA allocates what a step needs anew in every step, and in pages of 4 KB getting it takes a tenth of the step
  (docs/speed.md). glibc reads this setting when a process starts, and at no other time.

  Args:
    command: how this process was started, `sys.orig_argv`.
    environment: its variables.

  Returns:
    None where nothing is to be started again: another system, a GLIBC_TUNABLES of the person's own, or no program of ours.
  """
  options = list(command[1:])
  while options and options[0].startswith("-") and options[0] != "-m":
    del options[0]
  is_ours = options[:1] == ["-m"] and options[1].startswith("launch.")
  if sys.platform != "linux" or "GLIBC_TUNABLES" in environment or not is_ours:
    return None
  return {**environment, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


if (_environment := with_huge_pages(sys.orig_argv, os.environ)) is not None:
  os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], _environment)
