"""Makes faults in training runs and shows what they cost: python -m tests.faults [--only=EXPRESSION] [--json=FILE]

Runs tests/faults in its long form on this machine's CPU: kills, stops, signals, damaged and half-written checkpoints, a full
disk, batches that are not numbers, corrupt images, storage that fails, and a long run with a fault now and then. Shows
each as it ends, then the table, with goodput (useful steps over all steps made). The exit status is 1 if anything was not as it
must be.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import rich.console
import rich.table

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run_long_form(only: str | None) -> tuple[int, list[dict[str, Any]]]:
  """Runs pytest; returns its exit status and the rows of the table that the tests have written."""
  with tempfile.TemporaryDirectory() as directory:
    report = pathlib.Path(directory, "rows.jsonl")
    command = [sys.executable, "-m", "pytest", "tests/faults", "-v", "--no-header", "--tb=short", "--durations=0"]
    command += ["-p", "no:cacheprovider", *(["-k", only] if only else [])]
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, "NFNETS_CHAOS": str(report)}, check=False).returncode
    lines = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
  return status, [json.loads(line) for line in lines]


def show(status: int, rows: list[dict[str, Any]]) -> int:
  """Prints the table and its sums; returns the exit status of the program."""
  console = rich.console.Console(highlight=False)
  table = rich.table.Table(title="faults", title_justify="left", show_lines=False)
  for column in ("inject", "shown", "steps lost"):
    table.add_column(column, justify="right" if column == "steps lost" else "left", overflow="fold")
  for row in rows:
    table.add_row(row["inject"], row["shown"], str(row.get("steps_lost", "")))
  console.print(table)
  for row in rows:
    if "goodput" in row:
      console.print(
        f"goodput {row['goodput']:.1%} (useful steps over all steps made), {row['lost_per_fault']:.1f} steps lost a fault"
      )
  silent = sum(row.get("silent", 0) for row in rows)
  console.print(f"silent corruptions: {silent}; " + ("all as it must be" if status == 0 else "NOT all as it must be: see above"))
  return 1 if status or silent else 0


if __name__ == "__main__":
  parser = argparse.ArgumentParser("python -m tests.faults", description=__doc__)
  parser.add_argument("--only", metavar="EXPRESSION", help="runs the faults that pytest -k would, e.g. 'kill or damage'")
  parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also writes the rows to this file")
  options = parser.parse_args()
  status, rows = run_long_form(options.only)
  if options.json:
    options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
  sys.exit(show(status, rows))
