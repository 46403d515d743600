# Every target sets up what it needs in a private virtual environment, .venv; `make` alone lists the targets.
PYTHON ?= python3
ARGS ?=
SHOW ?=

VENV := .venv/bin/python
READY := .venv/.ready
LIBRARIES := .venv-libraries/.ready
LIBRARIES_PYTHON := .venv-libraries/bin/python
EXTRAS := dev
ifeq ($(shell uname -sm),Linux x86_64)
EXTRAS := dev,triton
endif

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test slow libraries emulate facilities timm lint docs bench gpu format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  SHOW="..."     passed on to the first half of demo:  make demo SHOW="--limit 60"'
	@echo '  ARGS="..."     passed on to demo, test, slow, emulate, bench or gpu:  make test ARGS="-k plan -x"'
	@echo '  PYTHON=...     the interpreter that .venv is made with, 3.11 or newer (now: $(PYTHON))'

demo: $(READY) ## Measure B42 beside the concatenating code, then train on handwritten digits; pictures in out/
	$(VENV) -m bench show $(SHOW)
	$(VENV) -m recipes.demo $(ARGS)

# One thread a worker: two workers with a thread pool each would fight over the cores.
test: $(READY) ## Run the tests, but for larger cases of what smaller ones test too
	OMP_NUM_THREADS=1 $(VENV) -m pytest -n 2 --dist loadgroup -m "not slow" $(ARGS)

slow: $(READY) ## Run those larger cases (tests/slow.py)
	OMP_NUM_THREADS=1 $(VENV) -m pytest -n 2 --dist loadgroup -m slow $(ARGS)

# With the torch that torchvision is built for, gigabytes on Linux: in an environment of its own.
libraries: $(LIBRARIES) ## Run the tests that need timm, torchvision, accelerate, fvcore, torchao and others
	OMP_NUM_THREADS=1 $(LIBRARIES_PYTHON) tests/facilities.py --libraries $(ARGS)

# Hours on two cores: every case, configuration and mutation. `make test` executes a share of it in minutes.
emulate: $(READY) ## Execute the compiled kernels of the whole table without a GPU, results in docs/results/
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(VENV) -m emulator $(ARGS)

facilities: $(READY) ## Run the tests behind docs/facilities.md and write its table
	OMP_NUM_THREADS=1 $(VENV) tests/facilities.py $(ARGS)

timm: $(LIBRARIES) ## Run timm's own tests of models on ours and write the table of docs/timm.md
	PYTHONPATH=. $(LIBRARIES_PYTHON) tests/timm_suite.py $(ARGS)

lint: $(READY) ## Check format, style and types; change nothing
	$(VENV) -m ruff format --check .
	$(VENV) -m ruff check .
	$(VENV) -m mypy

docs: $(READY) ## Build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV) -m mkdocs build --quiet --strict $(ARGS)

bench: $(READY) ## Measure speed and memory in ten minutes: table, plots, bench/results/, the tables of README
	$(VENV) -m bench run --minutes 9.5 $(ARGS)
	$(VENV) -m bench document

# With the interpreter that has the GPU's torch, not the CPU one of .venv.
gpu: ## Run all GPU tests, then time the models: nine minutes at most, results in bench/results/
	$(PYTHON) -m bench gpu $(ARGS); status=$$?; $(PYTHON) -m bench document && exit $$status

format: $(READY) ## Format the code and apply the safe fixes
	$(VENV) -m ruff check --fix .
	$(VENV) -m ruff format .

clean: ## Remove .venv, caches and build products; out/ stays
	rm -rf .venv .venv-libraries .pytest_cache .ruff_cache .mypy_cache build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(LIBRARIES): pyproject.toml
	"$(PYTHON)" -m venv .venv-libraries
	$(LIBRARIES_PYTHON) -m pip install --disable-pip-version-check -e '.[libraries]'
	@touch $@

$(READY): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "No '$(PYTHON)' here. Name a Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1)." \
			"Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Setting up .venv: some minutes, most of them for torch, and only once."
	"$(PYTHON)" -m venv .venv
	$(VENV) -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
