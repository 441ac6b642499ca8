# Two commands for a new machine with Python and a package index: `make demo` and `make test`.
# Each makes .venv on first use (reusing an importable torch >= 2.6, if there is one).
PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: demo test test-slow test-cuda fuzz lint bench docs clean

demo:            ## train a neural ODE on real data; shows its result and where its figure is
	$(PYTHON) scripts/bootstrap.py examples
	$(RUN) examples/hare_lynx_neural_ode.py

test:            ## the tests, without the slow ones
	$(PYTHON) scripts/bootstrap.py test examples
	$(RUN) -m pytest -q -n 2

test-slow:       ## the slow ones
	$(PYTHON) scripts/bootstrap.py test examples
	$(RUN) -m pytest -q -n 2 -m slow

test-cuda:       ## those that need a CUDA device
	$(PYTHON) scripts/bootstrap.py test
	$(RUN) -m pytest -q -m cuda

CASES ?= 1000
SEED ?= 0
fuzz:            ## random solves against an independent reference: make fuzz CASES=10000 SEED=0
	$(PYTHON) scripts/bootstrap.py test
	$(RUN) -m tests.fuzz --cases $(CASES) --seed $(SEED) --jobs 2

lint:            ## style and types
	$(PYTHON) scripts/bootstrap.py dev
	$(RUN) -m ruff check .
	$(RUN) -m pyright --pythonpath $(RUN)

bench:           ## every workload against every installed peer
	$(PYTHON) scripts/bootstrap.py bench
	$(RUN) -m benchmarks

docs:            ## the pages, in site/
	$(PYTHON) scripts/bootstrap.py docs
	$(RUN) -m mkdocs build --strict

clean:
	rm -rf .venv site .pytest_cache .ruff_cache
