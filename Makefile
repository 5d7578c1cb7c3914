# `make demo` and `make test` set up .venv first (seconds when that is done); ARGS passes options on.
# STACK=pretrain works in .venv-pretrain, with MMPretrain (see tools/setup_env.py).
PYTHON ?= python3
STACK ?= default
RUN := $(if $(filter default,$(STACK)),.venv,.venv-$(STACK))/bin/python

.PHONY: env demo test quick lint docs
env:
	@RKAN_STACK=$(STACK) $(PYTHON) tools/setup_env.py

demo: env
	@$(RUN) tools/demo.py $(ARGS)

test: env
	@$(RUN) -m pytest $(ARGS)

quick: env
	@$(RUN) -m pytest -m "not slow" $(ARGS)

lint: env
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

docs: env
	@$(RUN) -m sphinx -W --keep-going -b html docs build/docs $(ARGS)
