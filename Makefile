# Targets of the project; `make` alone lists them.

PYTHON ?= python3.11
# Not in the lock, because each machine needs its own build: CPU, CUDA, ROCm. Another index: make setup PIP_ARGS='--index-url ...'
TORCH ?= torch==2.13.0
PIP_ARGS ?=
# For `make demo`: your own nuScenes root and the name of its table folder.
DATA ?=
VERSION ?= v1.0-mini
PROFILE ?= demo

SHELL := /bin/bash
VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help setup check format test drills docs docs-serve demo learn starter run up down ui data-dvc clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

setup: $(READY)  ## install the environment in .venv (PYTHON=, TORCH=, PIP_ARGS=), again only when requirements.lock changes

$(READY): requirements.lock
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_ARGS) '$(TORCH)'
	$(VENV)/bin/python -m pip install $(PIP_ARGS) --no-deps -r requirements.lock -e .
	touch $@

check: $(READY)  ## check style, spelling, types and import layers
	ruff check .
	ruff format --check .
	codespell magicdrive_core flows tests benchmarks docs profiles *.md *.yaml *.toml Makefile
	mypy
	lint-imports

format: $(READY)  ## format the code
	ruff check --fix .
	ruff format .

test: check  ## check, then run all tests (what .ci/run calls)
	OMP_NUM_THREADS=1 pytest -n 2

drills: $(READY)  ## run the long drills (kills, full disks, servers away, load) and write benchmarks/results/drills.md
	OMP_NUM_THREADS=1 pytest -m drill tests/drills

docs: $(READY)  ## build the documentation site in site/; a broken link or a faulty docstring stops the build
	mkdocs build

docs-serve: $(READY)  ## serve the documentation site on 127.0.0.1:8000 and rebuild it at each change
	mkdocs serve --no-strict --dev-addr 127.0.0.1:8000

demo: $(READY)  ## run everything on generated data, or on yours: make demo DATA=/path VERSION=v1.0-mini
	magicdrive use $(PROFILE) $(if $(DATA),-S data.root='$(abspath $(DATA))' -S data.version='$(VERSION)' -S synth=null)
	python -m flows.pipeline

learn: $(READY)  ## train small pictures and measure control fidelity: docs/how-to/control-fidelity.md
	magicdrive use learn
	python -m flows.prepare
	python -m flows.train
	magicdrive fidelity

starter: $(READY)  ## train the starter model again, write it to outputs/starter and compare it with the shipped one
	magicdrive use starter
	python -m flows.prepare
	python -m flows.train
	magicdrive fidelity
	magicdrive bundle write outputs/starter --licence Apache-2.0
	if test -f starter/bundle.json; then magicdrive bundle compare starter outputs/starter; fi

run: $(READY)  ## run everything with params.yaml as it is
	python -m flows.pipeline

up: $(READY)  ## start a Prefect server, the deployments and a worker on 127.0.0.1 (PORT=4200)
	python -m flows.server up $(if $(PORT),--port $(PORT))

down: $(READY)  ## stop them; a training saves a checkpoint first
	python -m flows.server down

ui: $(READY)  ## serve MLflow's pages on 127.0.0.1:5000
	mlflow ui --host 127.0.0.1 --allowed-hosts '127.0.0.1:*,localhost:*' --cors-allowed-origins http://127.0.0.1:5000 \
		--backend-store-uri sqlite:///tracking/mlflow.db

data-dvc: $(READY)  ## update data.dvc after a change of the generator or its settings
	magicdrive synth --params profiles/demo.yaml
	dvc add --quiet data
	git --no-pager diff --stat -- data.dvc

clean:  ## remove all results after a question (data, artifacts, runs, outputs, tracking); the environment stays
	@du -shc data artifacts runs outputs tracking .dvc/cache .prefect 2>/dev/null; \
	read -r -p 'Remove all of it? [y/N] ' answer; \
	test "$$answer" = y && rm -rf data artifacts runs outputs tracking .dvc/cache .dvc/tmp .prefect dvc.lock || echo kept
