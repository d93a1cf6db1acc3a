# make demo      train LSKA-VAN under Mask R-CNN on the embedded microscopy image;
#                TASK=segmentation or classification for the other two tasks
# make test      pass the tests
# make soak      their long forms: hours
# make gpu       check it all on a GPU, in minutes; PYTHON=python3 for an environment of one's own
# make lint      what CI checks before the tests
# make release   build what is uploaded, and try it; uploads nothing
# make setup     only the virtual environment that these need
#
# STACK=onedl (default), openmmlab, newest   which release line of OpenMMLab
# VENV=folder                            where the environment lies
# PYTHON=python3.11                      what it is made from

STACK ?= onedl
TASK ?= detection
ifeq ($(STACK),onedl)
VENV ?= .venv
else
VENV ?= .venv-$(STACK)
endif
BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.ready-$(STACK)

.PHONY: demo test soak gpu lint release setup
.DEFAULT_GOAL := setup

setup: $(READY)

$(READY): requirements/$(STACK).txt requirements/tests.txt requirements/install.sh setup.py \
		lska_mm/__init__.py
	@bash requirements/install.sh $(STACK) $(VENV)
	@touch $@

requirements/$(STACK).txt:
	@echo "setup: unknown STACK=$(STACK); use one of: onedl openmmlab newest" >&2; exit 1

demo: $(READY)
	@PATH="$(BIN):$$PATH" TASK=$(TASK) bash demo/run.sh

test: $(READY)
	@PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

soak: $(READY)
	@PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 python -m pytest -m soak -s

gpu:
	@PATH="$(BIN):$$PATH" $(or $(PYTHON),python) -m pytest -m gpu -s tests/gpu

lint: $(READY)
	@PATH="$(BIN):$$PATH" ruff check .
	@PATH="$(BIN):$$PATH" ruff format --check .
	@PATH="$(BIN):$$PATH" mypy

release: $(READY)
	@PATH="$(BIN):$$PATH" bash .dev_scripts/release.sh
