# `make train VERSION=v22 ARGS="-p epochs 3 -p seed 1"`, `make test`, `make lab`. Needs Python >= 3.11, nothing else.
# Your own text: `make encode SOURCE=texts OUT=mine`, `make data DATA=mine`, `make train DATA=mine`.

PYTHON ?= python3
VERSION ?= v22
DATA ?=
SOURCE ?=
OUT ?= mine
ARGS ?=
BIN := .venv/bin
# Versions are those of constraints.txt. `make test LOCK=` in a checkout without .venv takes the newest; `make lock` keeps them.
LOCK ?= --constraint constraints.txt
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=900
INSTALL = $(BIN)/python -m pip install --quiet $(LOCK) --editable

.PHONY: train encode data sweep benchmark test size audit lock lab notebooks showcase gallery help

help:
	@echo 'make train VERSION=v22 [ARGS="-p epochs 3"]   train a version and judge it: notebook, HTML, verdict'
	@echo 'make encode SOURCE=texts OUT=mine [ARGS=...]   your texts to vectors: a folder, a table, a hub dataset'
	@echo 'make data DATA=mine                          the pre-flight: what is there to learn? (train takes DATA, too)'
	@echo 'make sweep [ARGS="--config fast=true"]       all of workflow/sweep.yaml: versions, seeds, datasets; goes on where it stopped'
	@echo 'make benchmark                               how fast this machine could be, and how fast it is: ten minutes alone'
	@echo 'make test                                    linters, the direction of imports, pytest, nbval over every notebook'
	@echo 'make size                                    lines, longest files and functions, depth and cycles of imports'
	@echo 'make audit                                   are weaknesses known in the locked packages? (told by make test, too)'
	@echo 'make lock                                    write constraints.txt from what is installed in .venv'
	@echo 'make lab                                     open JupyterLab'
	@echo 'make gallery [ARGS="--showcase"]             a static site of the runs: cards, figures, no request to anywhere'
	@echo 'make showcase                                all that is committed under outputs/showcase/, from nothing'
	@echo 'make notebooks                               run the notebooks in fast mode and store what nbval compares'

train: .venv/main
	@$(BIN)/python -m lvmlib train -p version $(VERSION) $(if $(DATA),-r data "$(DATA)") $(ARGS)

encode: .venv/encode
	@test -n "$(SOURCE)" || { echo "SOURCE= is missing: a folder of .txt and .md files, or what docs/data.md names, as in: make encode SOURCE=texts OUT=mine"; exit 2; }
	@$(BIN)/python -m lvmlib encode -r source "$(SOURCE)" -r out "$(OUT)" $(ARGS)

data: .venv/main
	@$(BIN)/python -m lvmlib data $(if $(DATA),-r data "$(DATA)") $(ARGS)

# The runs, then compare over those that have finished, also where some failed; 2: nothing could be started.
sweep: .venv/sweep
	@trap 'exit 130' INT; $(BIN)/snakemake $(ARGS); failed=$$?; [ $$failed -ne 2 ] || exit 2; \
	$(BIN)/snakemake compare $(ARGS) && exit $$failed

# Alone on the machine: nothing else should run beside it.
benchmark: .venv/main
	@$(BIN)/python -m lvmlib render notebooks/benchmark.ipynb "$${LVM_OUTPUTS:-outputs}/benchmark.ipynb" $(ARGS)

gallery: .venv/main
	@$(BIN)/python -m lvmlib gallery $(ARGS)

lab: .venv/main
	$(BIN)/jupyter lab notebooks/train.ipynb

# Fast runs of tests go to a folder of their own: they must not meet what an older code left under outputs/.
test: .venv/test
	-@$(BIN)/python tests/lock.py audit
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports
	outputs=$$(mktemp -d) && trap 'rm -rf "$$outputs"' EXIT && export LVM_OUTPUTS="$$outputs" LVM_FAST=1 LVM_LOCKED=$(if $(LOCK),1) && \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest notebooks tests $(NBVAL) \
		-n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What is committed under outputs/showcase/ (but data-english-sentences, whose vectors are not ours): hours on 2 cores. Stopped, it goes on.
showcase: .venv/export
	bash workflow/showcase.sh

size: .venv/test
	@$(BIN)/python tests/size.py

audit: .venv/test
	$(BIN)/python tests/lock.py audit

lock: .venv/test
	$(BIN)/python tests/lock.py

notebooks: .venv/test
	$(BIN)/python tests/refresh_notebooks.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python >= 3.11 is needed; name one by PYTHON=, as in: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "venv failed; on Debian: apt install python3-venv"; exit 1; }

.venv/main: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) .
	@touch $@

.venv/encode: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) '.[encode]'
	@touch .venv/main $@

.venv/export: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) '.[encode,export]'
	@touch .venv/main .venv/encode $@

.venv/sweep: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) '.[sweep]'
	@touch .venv/main $@

.venv/test: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) '.[audit,browser,encode,constrained,export,parallel,sweep,test]'
	@touch .venv/main .venv/encode .venv/export .venv/sweep $@
