"""Holds the peaks of known chips, from their makers' data sheets, and says what this machine's processor is."""

import contextlib
import dataclasses
import pathlib
import platform
import re


@dataclasses.dataclass(frozen=True, slots=True)
class Chip:
  """Holds the peaks of one JAX device from its maker's data sheet; None where they depend on the board or are not given.

  Attributes:
    kind: a regular expression that is searched for in `device_kind`.
    tflops: 10¹² FLOP/s, dense, bfloat16 (float16 on V100 and T4, which have no bfloat16), accumulated in float32.
    memory: GiB as sold, of which the runtime keeps some.
    memory_gb_s: 10⁹ bytes/s to and from the memory.
    link_gb_s: 10⁹ bytes/s out of the device over all its links to others of its kind together (a TPU's ICI, a GPU's NVLink), half
      of what is sold as bidirectional.
  """

  kind: str
  tflops: float
  memory: float | None = None
  memory_gb_s: float | None = None
  link_gb_s: float | None = None


# The first row whose pattern matches counts. On TPU v2 and v3 a device is half a chip, on later TPUs a whole one. A kind that no
# row describes for certain stays unknown.
CHIPS = (
  Chip(r"\bB200\b", 2250.0, 180, 8000, 900),
  Chip(r"\bH100\b.*\bNVL\b", 835.0, 94, 3900),
  Chip(r"\bH200\b.*\bNVL\b", 835.0, 141, 4800),
  Chip(r"\bH100\b.*\bPCIe\b", 756.0, 80, 2000),
  Chip(r"\bH100 80GB HBM3$", 989.0, 80, 3350, 450),
  Chip(r"\bH100\b", 989.0),
  Chip(r"\bH200\b", 989.0, 141, 4800, 450),
  Chip(r"\bGH200\b", 989.0),
  Chip(r"\bA100-SXM4-40GB\b", 312.0, 40, 1555, 300),
  Chip(r"\bA100-SXM4-80GB\b", 312.0, 80, 2039, 300),
  Chip(r"\bA100-PCIE-40GB\b", 312.0, 40, 1555),
  Chip(r"\bA100 80GB PCIe\b", 312.0, 80, 1935),
  Chip(r"\bA100\b", 312.0),
  Chip(r"\bV100S\b", 130.0, 32, 1134),
  Chip(r"\bV100-PCIE-16GB\b", 112.0, 16, 900),
  Chip(r"\bV100-PCIE-32GB\b", 112.0, 32, 900),
  Chip(r"\bV100-PCIE\b", 112.0),
  Chip(r"\bV100-SXM2-16GB\b", 125.0, 16, 900, 150),
  Chip(r"\bV100-SXM2-32GB\b", 125.0, 32, 900, 150),
  Chip(r"\bV100-SXM", 125.0),
  Chip(r"\bL40S\b", 362.0, 48, 864),
  Chip(r"\bL4\b", 121.0, 24, 300),
  Chip(r"\bT4\b", 65.0, 16, 320),
  Chip(r"\bRTX 4090$", 165.0, 24, 1008),
  Chip(r"^TPU v2$", 22.5, 8, 350, 124),
  Chip(r"^TPU v3$", 61.5, 16, 450, 164),
  Chip(r"^TPU v4$", 275.0, 32, 1228, 300),
  Chip(r"^TPU v5 ?(lite|e)", 197.0, 16, 819, 200),
  Chip(r"^TPU v5p?$", 459.0, 95, 2765, 600),
  Chip(r"^TPU v6 ?(lite|e)", 918.0, 32, 1640, 400),
)


def chip(device_kind: str) -> Chip | None:
  """Returns the row of `CHIPS` that describes a `device_kind`; None for an unknown kind, and for a slice of a chip (MIG)."""
  if re.search(r"\bMIG\b", device_kind):
    return None
  return next((row for row in CHIPS if re.search(row.kind, device_kind)), None)


def peak_tflops(device_kind: str) -> float | None:
  """Returns the peak TFLOP/s of one JAX device, see `Chip`; None for an unknown kind."""
  row = chip(device_kind)
  return None if row is None else row.tflops


def cpu_name() -> str:
  """Returns what the processor calls itself."""
  with contextlib.suppress(OSError):
    for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return platform.processor() or platform.machine()
