# Everything starts from python3 >= 3.11 and make; `make install` is a no-op until its inputs change.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed

.PHONY: help install demo test test-all lint types examples docs tutorials browser bench clean

help:
	@echo "make demo      learn a model of real digits, fit three guides, compare, write a report"
	@echo "make test      the fast tests       make test-all  with the slow ones"
	@echo "make lint      ruff                 make types     mypy"
	@echo "make examples  run the examples of the README and of docs/ as they stand"
	@echo "make docs      write the documentation site to build/site, check its links"
	@echo "make tutorials run all tutorials, and their hidden answers, from a clean state"
	@echo "make browser   open the report in headless Chromium, if there is one"
	@echo "make bench     the benchmarks, opponents included, in half an hour; writes benchmarks/RESULTS.md"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "neuroguide needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "python3 has no venv module; on Debian: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs,tutorials]'
	@touch $@

demo: install
	$(BIN)/neuroguide compare factor_analysis --data digits --out runs/demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

examples: install
	$(BIN)/python -m pytest tests/test_readme.py tests/test_docs.py -m "slow or not slow"

docs: install
	$(BIN)/sphinx-build -q -W --keep-going -c docs . build/site
	$(BIN)/python -m pytest tests/test_site.py -m slow

tutorials: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/test_tutorials.py -m "slow or not slow"

browser: install
	$(BIN)/python -m pytest tests/test_report.py -m slow

bench: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/run_all.py

clean:
	rm -rf $(VENV) runs build dist docs/api *.egg-info
