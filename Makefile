# Two commands do all the set-up: `make demo` (install, then the main job end to end) and `make test`.
# PYTHON chooses the interpreter that makes the environment: make install PYTHON=python3.12
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-gpu lint type format hooks bench docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: $(STAMP)  ## make the environment in .venv and install the package with its development tools

# uv installs the same packages several times faster than pip and shares files between environments; pip is the fallback.
# Compiled at once, as pip does: where PYTHONDONTWRITEBYTECODE is set, as in many containers, every start would do it anew.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"fsvfm needs Python 3.11 or newer, {sys.executable} is {v.major}.{v.minor}; choose another one with PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --compile-bytecode -e '.[dev]' || $(BIN)/python -m pip install -e '.[dev]'
	@touch $@

demo: install  ## portraits → pre-training → two detectors → evaluation → report.html; finished steps are not repeated
	$(BIN)/python -m fsvfm.prepare recipe=demo
	$(BIN)/python -m fsvfm.train experiment=demo_pretrain
	$(BIN)/python -m fsvfm.train experiment=demo_dfd
	$(BIN)/python -m fsvfm.train experiment=demo_dfd_adapter
	$(BIN)/python -m fsvfm.evaluate experiment=demo_dfd protocol=robustness_demo
	$(BIN)/python -m fsvfm.report

# Two processes with a thread each are faster than one with two: most of the time goes into start-up, not arithmetic.
test: install  ## the default test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(or $(PROCESSES),2) --dist loadfile

test-slow: install  ## tests that take minutes
	$(BIN)/python -m pytest -m slow

test-gpu: install  ## tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: install  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: install  ## mypy
	$(BIN)/mypy

format: install  ## rewrite in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

hooks: install  ## check style and types before every commit
	$(BIN)/python -m pip install -q pre-commit
	$(BIN)/pre-commit install

# Where `make bench` keeps its figures; name the machine. STEP: options of the two training benchmarks, on a GPU for example
# STEP="--device cuda --model vit_base --batch 256 --compile default".
OUT  ?= docs/performance/$(shell date +%F)
STEP ?=
bench: install  ## benchmarks, as ratios against a plain baseline, to OUT=<folder>; PHOTO=<portrait> adds video and prediction
	@set -e; cd benchmarks; run() { name=$$1; shift; echo "== $$name $$*"; ../$(BIN)/python $$name.py "$$@" --output "$(abspath $(OUT))/$$name.json"; }; \
	for name in masking loading evaluation startup preparation scale; do run $$name; done; \
	run pretraining $(STEP); run finetuning $(STEP); \
	$(if $(PHOTO),for name in video prediction; do run $$name --photo "$(abspath $(PHOTO))"; done)

docs: install  ## the documentation site in site/; a broken link or reference is an error
	$(BIN)/mkdocs build --strict

clean:  ## remove build products and caches; keeps .venv, data and runs
	rm -rf build dist site *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
