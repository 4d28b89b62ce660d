# The two commands of the README are `make demo` and `make test`: each sets up .venv by itself.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 4
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# What decides about a promotion. It is held to a higher coverage than the rest.
TRUST := errors files draw intervals records bundle artifacts extensions config policy graph proof attest gate ledger
comma := ,
empty :=
space := $(empty) $(empty)
TRUST_FILES := $(subst $(space),$(comma),$(foreach m,$(TRUST),mlflow_kdguard/$(m).py mlflow_kdguard/$(m)/*))

PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
PARALLEL := -n auto --maxprocesses $(WORKERS) --dist loadscope

.DEFAULT_GOAL := help
.PHONY: help demo test quick check static format lint types imports manifest doctest wheel bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## the whole story on real digits and a registry on this disk (under 5 minutes)
	$(BIN)/kdguard demo --out kdguard-demo

test: $(STAMP) ## all tests, with coverage floors for the package and for the trust core
	$(BIN)/coverage erase
	$(PYTEST) $(PARALLEL) --cov --cov-report=
	@$(BIN)/coverage report --fail-under=85
	@$(BIN)/coverage report --fail-under=90 --include='$(TRUST_FILES)'

quick: $(STAMP) ## tests without the slow ones and without coverage
	$(PYTEST) $(PARALLEL) -q -m 'not slow'

check: static doctest test ## what CI asks: format, lint, types, imports, doctests, tests, the wheel

static: format lint types imports manifest

format: $(STAMP)
	$(BIN)/ruff format --check .

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

imports: $(STAMP)
	$(BIN)/lint-imports

manifest: $(STAMP)
	$(BIN)/python tools/manifest.py --check

# pytest ends with 5 where there is no doctest at all, which is no failure.
doctest: $(STAMP)
	$(PYTEST) -q --doctest-modules --doctest-glob='*.md' mlflow_kdguard cli docs || [ $$? -eq 5 ]

wheel: $(STAMP) ## build the wheel, install it alone, check that it works without torch and mlflow
	$(PYTEST) -q tests/unit/test_packaging.py

bench: $(STAMP) ## benchmarks; results go to benchmarks/results
	$(BIN)/python -m benchmarks

clean: ## remove what the other targets made, except .venv
	rm -rf build dist kdguard-demo kdguard-work .coverage .coverage.* .mypy_cache .ruff_cache \
	  .pytest_cache .hypothesis .import_linter_cache *.egg-info

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Setting up $(VENV): this takes a few minutes, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "python3 -m venv failed: on Debian and Ubuntu, install python3-venv" >&2; exit 1; }
	$(BIN)/pip install --quiet --editable '.[all,dev]'
	@touch $@
