"""How the tests compile: most of their time is compiling, and hardly any is running what was compiled.

LLVM is told not to optimize, which halves the time, and with jaxlib 0.10 fusions are written by XLA's older emitter, all into one
module, which halves it again; later ones have no other emitter, and end the process at a flag that they do not know. With that
emitter XLA also fuses somewhat otherwise (1,245 fusions instead of 1,389 in one training step), so that numbers may differ in the
last digits. test_launch.py's main job compiles as people do.
"""

import importlib.metadata

_HAS_OLDER_EMITTER = importlib.metadata.version("jaxlib").startswith("0.10.")
FAST = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if _HAS_OLDER_EMITTER:
  FAST += " --xla_cpu_use_fusion_emitters=false"
