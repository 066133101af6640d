# The workshop. `make` alone says what there is; every target sets up what it needs in .venv, once.

# Which Python to build .venv from. Name one to choose: make test PYTHON=/opt/python3.13/bin/python3
PYTHON ?=
DEMO_ARGS ?=
TEST_ARGS ?=

PYTHONS = $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
PIP = .venv/bin/python -m pip --disable-pip-version-check --no-input
PYTEST = .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadgroup

# Pyright's launcher would ask the network for a newer version.
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

.PHONY: help demo test test-all lint bench docs lock
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:
	@echo 'make demo      see a model go to production and a bad one come back (DEMO_ARGS=… for the demo)'
	@echo 'make test      tests, lint and types; a few minutes (TEST_ARGS="-k gateway" for some of them)'
	@echo 'make test-all  the same and the long ones: simulated error rates, crashes, load'
	@echo 'make lint      ruff, pyright and the import contracts alone'
	@echo 'make bench     run bench/*.py and write bench/results/*.json'
	@echo 'make docs      check links, commands and examples in the documentation'
	@echo 'make lock      resolve the dependencies anew (needs uv)'
	@echo
	@echo 'Needs Python 3.11 or newer and make. The first run fills .venv from the locked dependencies.'

demo: .venv/.runtime
	@.venv/bin/shipworthy demo $(DEMO_ARGS)

# Each xdist worker is a process of its own: more threads inside it only fight over the cores.
test test-all: export OMP_NUM_THREADS = 1
test test-all: export OPENBLAS_NUM_THREADS = 1

test: export HYPOTHESIS_PROFILE = ci
test: .venv/.dev
	@$(PYTEST) -m "not long" $(TEST_ARGS)

test-all: export HYPOTHESIS_PROFILE = long
test-all: .venv/.dev
	@$(PYTEST) $(TEST_ARGS)

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	.venv/bin/lint-imports

bench: .venv/.dev
	@mkdir -p bench/results
	-@.venv/bin/python bench/gateway.py --install
	@for script in $$(grep -l __main__ bench/*.py); do \
	  name=$$(basename "$$script" .py); \
	  echo "== $$name"; \
	  .venv/bin/python "$$script" --json "bench/results/$$name.json" || exit; \
	done

docs: .venv/.dev
	@.venv/bin/python -m pytest tests/test_docs.py

# The development lock comes first: it holds all that the other one does, and decides the versions.
RESOLVE = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
  --no-annotate --no-emit-index-url --no-emit-find-links $(LOCK_ARGS) pyproject.toml
lock:
	$(RESOLVE) --all-extras --group dev -o requirements-dev.lock
	$(RESOLVE) --group build --constraints requirements-dev.lock -o requirements.lock

# --- set-up: .venv, then one of two sets of locked dependencies, then this package ---------------

.venv/.runtime: .venv/bin/python requirements.lock pyproject.toml
	@$(call install,requirements.lock)
	@touch $@

# Holds all of the runtime set in the same versions, so `make demo` has nothing to add afterwards.
.venv/.dev: .venv/bin/python requirements-dev.lock requirements.lock pyproject.toml
	@$(call install,requirements-dev.lock)
	@touch .venv/.runtime $@

# Pip's hundred lines as one that counts (a line for each where nobody watches). Errors show as they are.
define install
total=$$(grep -c '^[A-Za-z0-9]' $(1)); \
echo "Installing $(1): $$total packages, by version and hash. This takes a minute or two, once."; \
if [ -t 1 ]; then start='\r\033[K'; end=''; else start=''; end='\n'; fi; \
{ $(PIP) install --progress-bar off --require-hashes -r $(1); echo "status $$?"; } \
| { n=0; while read -r word name rest; do case "$$word $$name" in \
    Collecting*|Processing*|Ignoring*|"Requirement already") n=$$((n + 1)); \
      name=$${name##*/}; name=$${name%%[=;]*}; name=$${name%%-[0-9]*}; \
      [ "$$word" = Requirement ] || printf "$$start  %d of %d: %s$$end" $$n $$total "$${name%:}";; \
    "Building wheels"*|"Installing collected") \
      printf "$$start  %s$$end" "$$word the packages …";; \
    "status 0") printf "$$start"; exit 0;; \
    status*) printf "$$start"; exit "$$name";; \
  esac; done; } || exit; \
$(PIP) install --quiet --no-deps --no-build-isolation -e . || exit; \
echo "Installed into .venv."
endef

.venv/bin/python:
	@found= bare= seen=; \
	for candidate in $(PYTHONS); do \
	  version=$$("$$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	  seen="$$seen $$candidate ($$version)"; \
	  "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue; \
	  "$$candidate" -c 'import venv, ensurepip' 2>/dev/null || { bare="$$candidate"; continue; }; \
	  found="$$candidate"; break; \
	done; \
	if [ -z "$$found" ] && [ -n "$$bare" ]; then \
	  echo "$$bare can't make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	fi; \
	if [ -z "$$found" ]; then \
	  echo "Shipworthy needs Python 3.11 or newer; found:$${seen:- none of $(PYTHONS)}." >&2; \
	  echo "Install one (Debian, Ubuntu: apt-get install python3 python3-venv; macOS: brew install python)" >&2; \
	  echo "or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	echo "Making .venv with $$found ($$($$found -V 2>&1))."; \
	"$$found" -m venv --clear .venv
