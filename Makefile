# Everything is installed into .venv beside this file; nothing else on the machine changes.

VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed
STUDY ?= lab
JOBS  ?= 2

# 3.11 first: the pins in requirements.txt were made with it.
NEW_ENOUGH := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c '$(NEW_ENOUGH)' 2>/dev/null && { echo $$p; break; }; done)
UV := $(shell command -v uv 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup book site test jupyter weights clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with everything the book needs

$(STAMP): requirements.txt pyproject.toml
	@if [ ! -x $(PY) ]; then \
		if [ -n "$(UV)" ]; then \
			"$(UV)" venv --python "$(or $(PYTHON),3.11)" $(VENV); \
		elif [ -z "$(PYTHON)" ]; then \
			echo "The book needs Python 3.11, 3.12 or 3.13: install one, or name it: make setup PYTHON=/path/to/python3" >&2; \
			exit 1; \
		elif ! "$(PYTHON)" -m venv $(VENV); then \
			rm -rf $(VENV); \
			echo "$(PYTHON) could not make a virtual environment: install its venv package (Debian: python3-venv), or uv." >&2; \
			exit 1; \
		fi; \
	fi
	@if [ -n "$(UV)" ]; then install="$(UV) pip install --python $(PY)"; \
	else install="$(PY) -m pip install --disable-pip-version-check --quiet"; fi; \
	set -ex; \
	$$install -r requirements.txt; \
	$$install --no-deps -e .
	@touch $(STAMP)

book: setup  ## run every chapter and build the site from that run
	$(PY) -m lib execute --jobs $(JOBS)
	@$(MAKE) --no-print-directory site VIT_SEE_CHAPTERS=_build/chapters

# The folder of the executed chapters that the site shows.
site: export VIT_SEE_CHAPTERS ?= book/chapters
site: setup  ## build the site from the published chapters
	$(VENV)/bin/jupyter-book build book --config _config.yml -W -n --keep-going --all
	@echo "The book is at $(CURDIR)/_build/html/index.html"

# One thread per process: JOBS processes already fill the machine.
test: export OMP_NUM_THREADS = 1
# As in lib/site/run.py: memory is taken from the system once.
test: export MALLOC_MMAP_MAX_ = 0
test: export MALLOC_TRIM_THRESHOLD_ = 2000000000
test: setup  ## check the code, the library, the site, and every number in the chapters
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m nbstripout --keep-id --verify chapters/*.ipynb book/_template.ipynb
	$(PY) -m pytest -n $(JOBS) --dist loadscope tests book/chapters \
		--nbval --nbval-current-env --nbval-sanitize-with tests/nbval-sanitize.cfg

jupyter: setup  ## open the chapters' sources in JupyterLab
	$(VENV)/bin/jupyter lab chapters

weights: setup  ## train the models of a study that have no weights yet (STUDY=lab)
	$(PY) -m lib train --study $(STUDY)

clean:  ## remove what was built, keep .venv
	rm -rf _build .pytest_cache .ruff_cache *.egg-info
	find lib tests benchmarks chapters book -type d \
		\( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

distclean: clean  ## remove .venv as well
	rm -rf $(VENV)
