# What people and CI call. Every target sets up what it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
RUNTIME := .venv/.runtime-installed
DEV := .venv/.dev-installed
INSTALLED := build/installed

.PHONY: help demo test lint format bench clean

help:  ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(RUNTIME)  ## Export the demo checkpoint, verify it and let it continue a sentence
	$(BIN)/tnllm demo --output demo-bundle --overwrite

test: $(DEV)  ## Run all tests, with coverage
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --cov --cov-report=term

lint: $(DEV)  ## Check style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build && $(BIN)/pip install --quiet --no-deps --target $(INSTALLED) .
	cd $(INSTALLED) && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p tnllm_export
	cd $(INSTALLED) && ../../$(BIN)/lint-imports --config ../../pyproject.toml

format: $(DEV)  ## Put the code into the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV)  ## Measure drift, constant cost, scale and engines; writes benchmarks/results
	$(BIN)/python -m benchmarks

clean:  ## Remove what the other targets made
	rm -rf .venv build demo-bundle

# Types and import rules are checked in an installed copy: only there do kernels/ and graphs/ have their import names.
# torch comes first: what depends on it would otherwise fetch another release with gigabytes of GPU libraries.
$(RUNTIME): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(DEV): $(RUNTIME)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,train]'
	touch $@
