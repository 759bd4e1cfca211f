# The two commands: `make demo` and `make test`. Each sets up what it needs first; `make help` lists the rest.
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint docs clean
MAKEFLAGS += --no-print-directory
unexport PYTHONPATH
export PYTHON
BIN := .venv/bin
LOG := build/lint.log

help: ## what can be made
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

setup: ## .venv with Wave and all it needs; PYTHON=... names the Python to make it with
	@.ci/setup

demo: setup ## a real RocksDB measured here, and what moving its scheduling to an IPU costs and saves; DEMO_FLAGS=--help
	@$(BIN)/wave demo $(DEMO_FLAGS)

test: setup ## the tests; TEST_FLAGS="-m 'not slow'" for the quick ones
	@$(BIN)/pytest $(TEST_FLAGS)

lint: setup ## ruff, mypy --strict, import-linter
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary -p waveos >$(LOG) || { sed -E 's,^build/__editable__[^/]*/waveos/((agents|host|ipu_emulator|bench)/)?,\1,' $(LOG); exit 1; }
	@$(BIN)/lint-imports --no-cache >$(LOG) 2>&1 || { cat $(LOG); exit 1; }
	@echo "lint: clean"

docs: setup ## docs/policy-api.md from the docstrings
	@$(BIN)/python -P docs/generate.py

clean: ## everything that was made, .venv too
	@rm -rf .venv build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
