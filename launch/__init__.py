"""The programs, run as `python -m launch.NAME`: they read flags and return an exit status; what they do lies in nfnets."""

import os
import sys

# On CPUs XLA allocates what a step needs anew in every step, and getting it in pages of 4 KB takes a tenth of the step
# (docs/speed.md). glibc reads this setting when a process starts, so a program starts again with it; a person's own stays.
# sys.argv[0] is "-m" only while Python looks for the module to run: where this package is imported, nothing starts again.
if sys.platform == "linux" and sys.argv[:1] == ["-m"] and "GLIBC_TUNABLES" not in os.environ:
  os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
