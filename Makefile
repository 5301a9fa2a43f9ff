# Everything starts from a bare `python3` (3.10 or newer): the first target that needs it makes .venv from the lock.

PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready
TOO_OLD = $(shell $(PYTHON) -c 'import sys; print(sys.version_info < (3, 10))' 2>&1 || echo none)

.DEFAULT_GOAL := help
.PHONY: help demo test test-real test-versions test-install check lint bench results evidence evidence-real reliability docs site lock clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | expand -t 15

$(READY): requirements.lock pyproject.toml
	$(if $(filter False,$(TOO_OLD)),,$(error attnpred needs Python 3.10 or newer, and `$(PYTHON)` is not one: name another, as in `make PYTHON=python3.12`))
	@test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY) ## a real model reads a book, and answers with all of its cache and with parts of it; writes attention.png
	.venv/bin/attnpred demo --figure attention.png

test: $(READY) ## all tests
	$(PY) -m pytest -q --numprocesses auto --dist loadfile

test-real: $(READY) ## tests of a real model, which the package index has to give
	$(PY) -m pytest -q -m real tests/real

check: $(READY) ## the quick tests, under a minute
	$(PY) -m pytest -q --numprocesses auto --dist loadfile -m "not slow"

test-versions: $(READY) ## the quick tests with the oldest torch and transformers that are supported, one between, and the newest
	$(PY) -m pip install --quiet --disable-pip-version-check uv
	$(PY) -m tools.test_versions

test-install: $(READY) ## build wheel and sdist, install them afresh with each extra, and use them
	$(PY) -m pip install --quiet --disable-pip-version-check uv
	$(PY) -m tools.test_install

lint: $(READY) ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: $(READY) ## decode speed against the dense paths
	$(PY) -m benchmarks.decode

results: $(READY) ## run the demo for more policies into docs/results/demo.json
	$(PY) -m tools.demo_results

evidence: $(READY) ## measure what docs/policies.md and docs/evidence.md show; hours, goes on where it was stopped
	$(PY) -m tools.evidence
	$(MAKE) --no-print-directory docs

evidence-real: $(READY) ## the same for real models, which the package index has to give; FILES= names a folder of task files
	$(PY) -m tools.evidence_real $(if $(FILES),--files $(FILES))
	$(MAKE) --no-print-directory docs

reliability: $(READY) ## inject faults of every kind, some minutes, into docs/reliability.md
	$(PY) -m tools.reliability

docs: $(READY) ## rewrite what is generated: cli.md, speed.md, policies.md, evidence.md, reliability.md, tables of README.md and predictor.md
	$(PY) -m tools.docs_cli
	$(PY) -m tools.readme_table
	$(PY) -m tools.recovery_tables
	$(PY) -m tools.speed_tables
	$(PY) -m tools.serve_table
	$(PY) -m tools.policy_tables
	$(PY) -m tools.evidence_tables
	$(PY) -m tools.reliability --page

site: $(READY) ## build the site of the documents into site/
	$(PY) -m mkdocs build --strict --quiet

lock: $(READY) ## rewrite requirements.lock; UPGRADE=1 moves to the newest versions
	$(PY) -m pip install --quiet --disable-pip-version-check uv
	$(PY) -m tools.lock $(if $(UPGRADE),--upgrade)

clean: ## remove .venv, caches and what the targets above wrote
	rm -rf .venv .venvs .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist site *.egg-info attention.png
	find attnpred tests tools recipes benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
