"""The programs, run as `python -m launch.NAME`: they read flags and return an exit status; what they do lies in nfnets."""

import os
import sys

# On CPUs XLA allocates what a step needs anew in every step, and getting it in pages of 4 KB takes a tenth of the step. A kept
# program is read sooner where malloc puts small freed pieces together at once (docs/speed.md). glibc reads these settings when a
# process starts, so a program starts again with them; a person's own stay.
# sys.argv[0] is "-m" only while Python looks for the module to run: where this package is imported, nothing starts again.
if sys.platform == "linux" and sys.argv[:1] == ["-m"] and "GLIBC_TUNABLES" not in os.environ:
  os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1:glibc.malloc.mxfast=0"
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
