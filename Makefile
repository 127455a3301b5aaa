# make digits   installs into .venv, trains a small NFNet on handwritten digits, evaluates it
# make test     installs into .venv, runs every test
# make lint     installs into .venv, runs ruff (rules, format) and pyrefly (types)
# make chaos    makes faults in training runs and shows what they cost: half an hour; ARGS='--only=kill --json=rows.json'

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/digits
SHELL := bash

.PHONY: digits test lint chaos

digits: $(VENV)/installed
	$(RUN) -m launch.train --config=configs/digits.py --workdir=$(WORKDIR)
	$(RUN) -m launch.evaluate --checkpoint=$(WORKDIR)

# Two processes of one thread each: much of the time is XLA compiling, on one thread.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 XLA_FLAGS="$(XLA_FLAGS) --xla_cpu_multi_thread_eigen=false" $(RUN) -m pytest -n 2 --dist worksteal --durations=10

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyrefly check --python-interpreter-path $(RUN)

chaos: $(VENV)/installed
	$(RUN) -m tests.faults $(ARGS)

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"error: Python 3.11 or newer is needed, $(PYTHON) is {sys.version.split()[0]}; say which: make PYTHON=python3.12 ...")'
	@echo "Installing requirements.txt into $(VENV): some 80 packages, a minute or two"
	@$(PYTHON) -m venv $(VENV)
	@set -o pipefail; $(RUN) -m pip install --disable-pip-version-check --progress-bar off -r requirements.txt | awk ' \
	  /^Collecting / { sub(/[^A-Za-z0-9_.-].*/, "", $$2); printf "%s ", $$2; fflush() } \
	  /^Installing collected/ { printf "\nUnpacking\n"; fflush() }'
	@touch $@
