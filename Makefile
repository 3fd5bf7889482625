# Developers and users need only the targets in this file. CI calls `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CODE := model cluster protos services tests benchmarks
# Each stamp file records that a set of packages was installed after the last change of pyproject.toml. `make up` needs
# the first stamp. The second stamp adds the tools and schemas that only tests, linters and benchmarks need.
RUNTIME := $(VENV)/.installed-runtime
DEVELOPMENT := $(VENV)/.installed-development
# Tests need only the Triton kernels of mamba-ssm, which are Python code. So its C++ code is not built, its dependencies,
# which are large, are not installed, and it does not look for a built wheel on GitHub.
MAMBA_FLAGS := MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE

.DEFAULT_GOAL := help
.PHONY: help up test clients lint protos bench clean

help: ## Show this list.
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(RUNTIME): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --editable .
	@touch $@

$(DEVELOPMENT): $(RUNTIME)
	$(PIP) install --editable '.[dev,bench,triton]'
	$(MAMBA_FLAGS) $(PIP) install --no-deps --no-build-isolation --no-binary mamba-ssm mamba-ssm==2.3.2.post1
	@touch $@

up: $(RUNTIME) ## Install what serving needs, then serve the demo model on 127.0.0.1 (REST 8000, gRPC 9000) until Ctrl-C.
	$(BIN)/expertmesh up $(ARGS)

test: lint ## Install everything, then check style and types and run every test.
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	$(BIN)/python -m pytest -m 'not serial' --numprocesses 2 --dist loadfile; \
	status=$$?; $(BIN)/python -m pytest -m serial && exit $$status
endif

clients: $(DEVELOPMENT) ## Run third-party clients, each in its own environment, against a server (about 15 minutes).
	$(BIN)/python -m tests.clients.run $(ARGS)

lint: $(DEVELOPMENT) ## Check style, formatting and types.
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

protos: $(DEVELOPMENT) ## Generate the Python code of protos/*.proto again.
	$(BIN)/python -m protos.generate

bench: $(DEVELOPMENT) ## Measure tokens per second: 3 shards against local experts and transformers (about 15 minutes).
	$(BIN)/python -m benchmarks.throughput $(ARGS)

clean: ## Remove the virtual environment and the caches.
	rm -rf $(VENV) .clients .mypy_cache .ruff_cache .pytest_cache build *.egg-info
