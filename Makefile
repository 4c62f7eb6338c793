# Everything is installed into .venv beside this file; nothing else on the machine changes.

VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed
STUDY ?= lab
JOBS  ?= 2

# As far as the pins in requirements.txt go; 3.11 first, since the book's numbers were made with it.
NEW_ENOUGH := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c '$(NEW_ENOUGH)' 2>/dev/null && { echo $$p; break; }; done)
UV := $(shell command -v uv 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup book site lint check test jupyter weights pins clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with everything the book needs

$(STAMP): requirements.txt pyproject.toml
	@if [ ! -x $(PY) ]; then \
		if [ -n "$(UV)" ]; then \
			"$(UV)" venv --python "$(or $(PYTHON),3.11)" $(VENV); \
		elif [ -z "$(PYTHON)" ]; then \
			echo "The book needs Python 3.11 to 3.14: install one, or name it: make setup PYTHON=/path/to/python3" >&2; \
			exit 1; \
		elif ! "$(PYTHON)" -m venv $(VENV); then \
			rm -rf $(VENV); \
			echo "$(PYTHON) could not make a virtual environment: install its venv package (Debian: python3-venv), or uv." >&2; \
			exit 1; \
		fi; \
	fi
# uv can take PyTorch built for this machine, without CUDA where there is no GPU, from PyTorch's own
# index. Where that index cannot be reached it takes what pip takes: on Linux the build with CUDA.
	@set -e; \
	if [ -n "$(UV)" ]; then \
		install="$(UV) pip install --python $(PY)"; \
		UV_TORCH_BACKEND=$${UV_TORCH_BACKEND:-auto} $$install -r requirements.txt || { \
			echo "Once more, without PyTorch's own index:" >&2; \
			env -u UV_TORCH_BACKEND $$install -r requirements.txt; \
		}; \
	else \
		install="$(PY) -m pip install --disable-pip-version-check --quiet"; \
		$$install -r requirements.txt; \
	fi; \
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
check test: export OMP_NUM_THREADS = 1
# As in lib/site/run.py: memory is taken from the system once.
check test: export MALLOC_MMAP_MAX_ = 0
check test: export MALLOC_TRIM_THRESHOLD_ = 2000000000

lint: setup
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m nbstripout --keep-id --verify chapters/*.ipynb book/_template.ipynb
	@if command -v actionlint >/dev/null; then actionlint; \
	else echo "actionlint is not installed: the workflows in .github are not checked"; fi

check: lint  ## lint and the quick tests, a minute or so
	$(PY) -m pytest -q -n $(JOBS) -m "not slow" tests

test: lint  ## check the code, the library, the site, and every number in the chapters
	$(PY) -m pytest -n $(JOBS) --dist loadscope tests book/chapters \
		--nbval --nbval-current-env --nbval-sanitize-with tests/nbval-sanitize.cfg

jupyter: setup  ## open the chapters' sources in JupyterLab
	$(VENV)/bin/jupyter lab chapters

weights: setup  ## train the models of a study that have no weights yet (STUDY=lab)
	$(PY) -m lib train --study $(STUDY)

# Changes no more than it must; `make pins UPGRADE=--upgrade` takes the newest of everything. What
# PyTorch for Linux brings itself (CUDA) stays out: other builds of it need other packages, or none.
pins:  ## resolve requirements.txt for every system and Python the book claims
	{ echo "# Every package of the environment the book was made with, resolved by \`make pins\` for"; \
	  echo "# Python 3.11.0 to 3.14 on Linux, macOS and Windows. CUDA, if any, comes with PyTorch."; \
	} > requirements.new
	cp requirements.txt requirements.resolved
	$(or $(UV),$(PY) -m uv) pip compile --quiet --universal --python-version 3.11.0 --all-extras --group site \
		--no-annotate --no-header --no-emit-index-url --no-emit-find-links $(UPGRADE) \
		pyproject.toml --output-file requirements.resolved
	grep -vE '^(cuda-|nvidia-|triton)' requirements.resolved >> requirements.new
	rm requirements.resolved
	mv requirements.new requirements.txt

clean:  ## remove what was built, keep .venv
	rm -rf _build .pytest_cache .ruff_cache *.egg-info
	find lib tests benchmarks chapters book -type d \
		\( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

distclean: clean  ## remove .venv as well
	rm -rf $(VENV)
