"""Makes faults in training runs and shows what they cost: python -m launch.chaos

Runs tests/faults in its long form on this machine's CPU: kills, stops, signals, damaged and half-written checkpoints, a full
disk, batches that are not numbers, corrupt images, storage that fails, and a long run with a fault now and then. Shows
each as it ends, then the table, with goodput (useful steps over all steps made). --only=EXPRESSION runs those that pytest -k
would; --json=FILE keeps the rows. Exit status 1 if anything was not as it must be.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import rich.console
import rich.table
from absl import flags

from launch import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent


def define(values: flags.FlagValues) -> None:
  flags.DEFINE_string("only", None, "Which faults, by words of their names, e.g. 'kill or damage'.", flag_values=values)
  flags.DEFINE_string("json", None, "Also write the rows to this file.", flag_values=values)


def run(values: flags.FlagValues) -> int:
  if not (ROOT / "tests" / "faults").is_dir():
    raise cli.UsageError(f"{ROOT / 'tests' / 'faults'} is not there: run this from a checkout")
  console = rich.console.Console(highlight=False)
  with tempfile.TemporaryDirectory() as directory:
    report = pathlib.Path(directory, "rows.jsonl")
    command = [
      sys.executable,
      "-m",
      "pytest",
      "tests/faults",
      "-v",
      "--no-header",
      "--tb=short",
      "--durations=0",
      "-p",
      "no:cacheprovider",
      *(["-k", values.only] if values.only else []),
    ]
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, "NFNETS_CHAOS": str(report)}, check=False).returncode
    rows = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()] if report.exists() else []
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
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
  cli.main(run, define, __doc__)
