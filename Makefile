# `make demo` and `make test` set up .venv first (seconds when that is done); ARGS passes options on.
# Tests run on all cores (on four at most); ARGS="-n 0" runs them in one process.
# STACK=pretrain works in .venv-pretrain, with MMPretrain (see tools/setup_env.py).
PYTHON ?= python3
STACK ?= default
RUN := $(if $(filter default,$(STACK)),.venv,.venv-$(STACK))/bin/python
PYTEST = $(RUN) -m pytest -n logical --maxprocesses 4 --dist worksteal

.PHONY: env demo test quick lint docs
env:
	@RKAN_STACK=$(STACK) $(PYTHON) tools/setup_env.py

demo: env
	@$(RUN) tools/demo.py $(ARGS)

test: env
	@$(PYTEST) $(ARGS)

quick: env
	@$(PYTEST) -m "not slow" $(ARGS)

lint: env
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

docs: env
	@$(RUN) -m sphinx -W --keep-going -b html docs build/docs $(ARGS)
