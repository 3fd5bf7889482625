# Everything a developer or a user does goes through here; CI calls `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CODE := model cluster protos services tests benchmarks

.DEFAULT_GOAL := help
.PHONY: help up test lint protos bench clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

up: $(INSTALLED) ## Install, then serve the demo model on 127.0.0.1 (REST 8000, gRPC 9000) until Ctrl-C
	$(BIN)/expertmesh up $(ARGS)

test: lint ## Install, then lint, check types and run every test
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED) ## Check style, formatting and types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

protos: $(INSTALLED) ## Generate the Python code of protos/*.proto again
	$(BIN)/python -m protos.generate

bench: $(INSTALLED) ## Measure tokens per second, 3 shards against local experts and transformers, ~15 minutes
	$(BIN)/python -m benchmarks.throughput $(ARGS)

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
