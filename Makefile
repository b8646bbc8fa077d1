# `make demo` and `make test` set up everything they need; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: help demo repro test lint types contracts unit test-faults fuzz bench-real bench-peers bench-extraction \
	bench-reduce bench-service protos pins clean
.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		|| { echo "steerage needs Python 3.11 to 3.13; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing steerage[pipeline] into $(VENV) (once; some minutes)"
	$(PIP) install --constraint constraints.txt --editable '.[pipeline]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing steerage[dev] into $(VENV) (once; some minutes)"
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo  ## The main job, end to end, on the pocket model
	$(BIN)/python examples/demo.py

repro: $(VENV)/.demo  ## The four published systems on the pocket model (20 minutes)
	$(BIN)/python examples/repro.py

test: lint types contracts unit  ## Lint, types, import contracts and tests (under 15 minutes)

lint: $(VENV)/.dev  ## Style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev  ## Types, strictly
	$(BIN)/mypy

contracts: $(VENV)/.dev  ## Who may import whom, and whether the stubs are fresh
	$(BIN)/lint-imports
	$(BIN)/python protos/generate.py --check

# Most of a test's time goes into starting Python, torch and Ray, on one core.
TEST_WORKERS ?= 2
unit: $(VENV)/.dev  ## Tests, without the slow ones; TEST_WORKERS=2 files at once
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not faults' -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test-faults: $(VENV)/.dev  ## Kill -9 and the whole demo, on real processes (minutes)
	$(BIN)/pytest -m faults --timeout 1200

.venv-fuzz/.ready: pyproject.toml constraints.txt
	@echo "installing atheris and steerage[server] into .venv-fuzz (once; a minute)"
	$(PYTHON) -m venv .venv-fuzz
	.venv-fuzz/bin/pip --disable-pip-version-check --quiet install \
		--constraint constraints.txt --editable '.[server]' atheris==3.0.0
	@touch $@

FUZZ_SECONDS ?= 30
fuzz: .venv-fuzz/.ready  ## Fuzz everything that is parsed, FUZZ_SECONDS=30 each
	.venv-fuzz/bin/python tests/fuzz/fuzz.py --all $(FUZZ_SECONDS)

STEERAGE_SHARED ?= ../shared
bench-real: $(VENV)/.demo  ## A real model and a real data set; wants STEERAGE_SHARED=FOLDER
	$(BIN)/python benchmarks/real_input.py --model $(STEERAGE_SHARED)/models/stories260K \
		--questions $(STEERAGE_SHARED)/data/coordinate-other-ais.jsonl

# Each peer in an environment of its own: their pins clash.
PEERS := $(basename $(notdir $(wildcard benchmarks/extraction_peers/pins/*.txt)))
.venv-bench-%/.ready: benchmarks/extraction_peers/pins/%.txt
	@echo "installing $* into .venv-bench-$* (once; some minutes)"
	$(PYTHON) -m venv .venv-bench-$*
	.venv-bench-$*/bin/pip --disable-pip-version-check --quiet install --requirement $<
	@touch $@

bench-peers: $(PEERS:%=.venv-bench-%/.ready)  ## Install what bench-extraction compares with

bench-extraction: $(VENV)/.demo bench-peers  ## Extraction beside its peers (an hour); wants STEERAGE_SHARED=FOLDER
	$(BIN)/python benchmarks/extraction.py --out benchmarks/results/extraction.json \
		--questions $(STEERAGE_SHARED)/data/coordinate-other-ais.jsonl

.venv-bench-reduce/.ready: benchmarks/reduction_peers/pins/reduce.txt
	@echo "installing dask and scikit-learn into .venv-bench-reduce (once; a minute)"
	$(PYTHON) -m venv .venv-bench-reduce
	.venv-bench-reduce/bin/pip --disable-pip-version-check --quiet install --requirement $<
	@touch $@

bench-reduce: $(VENV)/.demo .venv-bench-reduce/.ready  ## Reduction beside its peers (half an hour, 30 GB of disk)
	$(BIN)/python benchmarks/reduction.py --out benchmarks/results/reduction.json

bench-service: $(VENV)/.demo  ## The service beside a bare gRPC server (ten minutes)
	$(BIN)/python benchmarks/service.py --out benchmarks/results/service.json

protos: $(VENV)/.dev  ## Generate the gRPC stubs anew
	$(BIN)/python protos/generate.py

pins:  ## Renew constraints.txt from the newest versions that pyproject.toml allows
	rm -rf .venv-pins && $(PYTHON) -m venv .venv-pins
	.venv-pins/bin/pip --quiet install 'torch==2.13.0' '.[dev]'
	{ sed -n '/^#/p' constraints.txt; \
	  .venv-pins/bin/pip freeze --exclude steerage | sed 's/+cpu//'; } > constraints.new
	mv constraints.new constraints.txt && rm -rf .venv-pins

clean:  ## Remove what the demo and the tests have left
	rm -rf steerage-demo steerage-repro .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
