# make demo      a map over real input, on a machine that has nothing but Python 3.11 or later
# make test      all tests            (ARGS='-m "not slow"' for the fast ones)
# make test-all  the fast tests on every Python that is here, then all tests
# make check     format, lint, types, import contracts, fast tests
# make mutants   breaks the state files line by line and sees that a test turns red
# make bench     beside pools, joblib, dask, ray and others; tables, a plot, into the documents
#                (minutes; installs them)
# make bench-quick   rougher, without those that take seconds to start; under two minutes
#
# PYTHON=python3.12 chooses the interpreter, VENV=folder where the environment is made.

VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

# The newest interpreter that runs, is new enough and can make a venv. Each is tried, since a
# version switcher's command may exist and fail.
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
ifndef PYTHON
PYTHON := $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c '$(USABLE)' 2>/dev/null && echo $$p && break; done)
endif

.PHONY: demo test test-all check mutants bench bench-quick clean

demo: $(VENV)/.installed
	$(BIN)/python examples/count_identifiers.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(ARGS)

test-all: test-3.12 test-3.13 test

# The fast tests on another Python, in a venv of its own. Where that Python is not to be had,
# one line says so. (PYENV_VERSION makes a version switcher's command run; others ignore it.)
test-3.%: WHAT = test ARGS='-q -m "not slow"'
venv-3.%: WHAT = .venv-3.$*/.installed-test
test-3.% venv-3.%:
	@found=$$(PYENV_VERSION=3.$* python3.$* -c '$(USABLE)' 2>/dev/null && \
		PYENV_VERSION=3.$* python3.$* -c 'import sys; print(sys.executable)'); \
	if [ -n "$$found" ]; then \
		$(MAKE) --no-print-directory VENV=.venv-3.$* PYTHON="$$found" $(WHAT); \
	else \
		echo "no python3.$* that runs here: not tested on it"; \
	fi

check:
	./check

mutants: $(VENV)/.installed-test
	$(BIN)/python tests/mutants.py $(ARGS)

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks --json benchmarks/results/latest.json $(ARGS)
	$(BIN)/python -m benchmarks.documents

bench-quick: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks --quick $(ARGS)

clean:
	rm -rf .venv .venv-3.* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache \
		.import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $(VENV)/.installed $@

# All at once, or, where one of them cannot be had, each that can.
$(VENV)/.installed-bench: setup.cfg pyproject.toml $(VENV)/.installed-test
	@install="$(BIN)/python -m pip install --quiet --disable-pip-version-check"; \
	$$install --editable '.[test,bench]' || \
	sed -n '/^bench =/,/^\[/s/^    //p' setup.cfg | while read -r peer; do \
		$$install "$$peer" || echo "not to be had, and not measured: $$peer" >&2; \
	done
	@touch $(VENV)/.installed $(VENV)/.installed-test $@

# A venv whose interpreter has gone is a dangling link, which make takes for a missing file.
$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "needs Python 3.11 or later with its venv module" \
		"(on Debian: apt-get install python3 python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
