"""Runs a command in N processes: python -m launch.pods.local --processes=2 -- python -m launch.train --config=… --workdir=…

--gpus gives GPU i to process i, and --devices=4 gives each process 4 CPU devices. Lines of output begin with "[process]", and a
signal is passed on to all. When one process fails, the others have --grace seconds to end. All start again, up to --restarts
times, after the statuses that ask for it (nfnets/distributed/exit_status.py). The status is that of the first that failed.

With --processes=1, the default, the command keeps its output and finds the processes of other machines as without this program;
a cluster engine's script can so have it started again on each of its nodes."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from nfnets.distributed import should_restart


def run_once(options: argparse.Namespace, children: list[subprocess.Popen]) -> int:
  """Runs the command in all processes, which it adds to `children`; returns the status of the first that failed, or else 0."""
  several = options.processes > 1
  environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
  if several:
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{free.getsockname()[1]}"
    environ |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address}
    environ |= {"JAX_NUM_PROCESSES": str(options.processes)}
  if options.devices:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={options.devices}"
    environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
  children[:] = [
    subprocess.Popen(  # in sessions of their own: a terminal sends Ctrl-C to this process alone, which passes it on once
      options.command,
      stdout=subprocess.PIPE if several else None,
      stderr=subprocess.STDOUT if several else None,
      start_new_session=True,
      env={
        **environ,
        **({"JAX_PROCESS_ID": str(i)} if several else {}),
        **({"JAX_LOCAL_DEVICE_IDS": str(i)} if options.gpus else {}),
      },
    )
    for i in range(options.processes)
  ]
  copy = lambda i, child: [os.write(1, f"[{i}] ".encode() + line) for line in child.stdout]
  printers = [threading.Thread(target=copy, args=numbered) for numbered in enumerate(children) if several]
  for printer in printers:
    printer.start()
  first, until, running = 0, float("inf"), True
  while running:
    running = None in [child.poll() for child in children]
    if not first and (first := next((child.returncode for child in children if child.returncode), 0)):
      until = time.monotonic() + options.grace
    for child in children if running and time.monotonic() > until else []:
      child.kill()
    time.sleep(0.05)
  for printer in printers:
    printer.join()
  return 128 - first if first < 0 else first


if __name__ == "__main__":
  parser = argparse.ArgumentParser("python -m launch.pods.local", description=__doc__)
  for name, kind, value in (("processes", int, 1), ("devices", int, None), ("restarts", int, 0), ("grace", float, 60.0)):
    parser.add_argument(f"--{name}", type=kind, default=value)
  parser.add_argument("--gpus", action="store_true")
  parser.add_argument("command", nargs="+", metavar="-- COMMAND")
  options, children, signals, status = parser.parse_args(), [], [], 0
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: (signals.append(number), [child.send_signal(number) for child in children]))
  for restart in range(options.restarts + 1):
    status = run_once(options, children)
    if signals or not should_restart(status):
      break
    print(f"status {status}{f': starting again, {restart + 1} of {options.restarts}' * (restart < options.restarts)}", flush=True)
  sys.exit(status)
