# Viewpoint: `make` lists what there is. Each target installs what it needs first, into .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL_LOG := $(VENV)/install.log
INSTALL_NOTE_SECONDS ?= 15

# $(call install,PIP,WORDS,FOLDER): pip's own words go to FOLDER/install.log; a note every few seconds says where it is
define install
@$(1) install $(2) >>$(3)/install.log 2>&1 & pip=$$!; trap "kill $$pip 2>/dev/null; wait $$pip; exit 130" INT TERM; seconds=0; \
	while kill -0 $$pip 2>/dev/null; do sleep 1; seconds=$$((seconds + 1)); \
		[ $$((seconds % $(INSTALL_NOTE_SECONDS))) = 0 ] && kill -0 $$pip 2>/dev/null && \
			echo "  $$seconds s, $$(du -sh $(3) | cut -f1) in $(3): $$(grep -aE '^ *(Collecting|Downloading|Installing)' $(3)/install.log | tail -n 1 | sed -E 's/^ *//; s/(.{70}).+/\1 .../')" >&2; \
	done; \
	wait $$pip || { tail -n 15 $(3)/install.log >&2; echo "Installation failed; whole log: $(3)/install.log" >&2; exit 1; }
endef

JOB ?= pointmcd
NODES ?= 1
ON ?= local
SET ?=
ARGS ?=
PORT ?= 9000

.PHONY: .venv-bench help install install-dev launch doctor s3 test test-all test-s3 test-cluster test-gpu check format bench smoke clean manifests

help: ## this list
	@echo "Viewpoint: pre-train 3D point encoders by distilling 2D networks."
	@echo
	@grep -hE '^[a-z][a-z0-9-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/\1|\2/' | \
		awk -F'|' '{ printf "  make %-12s %s\n", $$1, $$2 }'
	@echo
	@echo "First run, no data and no GPU needed:  make launch JOB=pointmcd NODES=4"
	@echo "Everything else:                       $(BIN)/viewpoint --help"

install: $(VENV)/.installed ## packages into .venv (every other target does this by itself)

install-dev: $(VENV)/.installed-dev

launch: $(VENV)/.installed ## run a job: JOB=pointmcd NODES=4 [DATA=url] [RUNS=url] [RUN=name] [SET="a=1 b=2"] [ON=k8s] [ARGS=...]
	@$(BIN)/viewpoint launch $(JOB) --nodes $(NODES) --on $(ON) \
		$(if $(DATA),--data $(DATA)) $(if $(RUNS),--runs $(RUNS)) $(if $(RUN),--run $(RUN)) \
		$(foreach assignment,$(SET),--set $(assignment)) $(ARGS)

doctor: $(VENV)/.installed ## check this machine: packages, rays, memory, disk, ports
	@$(BIN)/viewpoint doctor

smoke: $(VENV)/.installed ## the shortest whole path: tiny corpus, one node, ingest to linear SVM (about a minute)
	@$(BIN)/viewpoint launch $(JOB) --nodes 1 --runs runs/smoke \
		--set "prepare.corpus.source=demo://shapes?count=80&seed=0" --set epochs=2 --set global_batch=16 $(ARGS)

s3: $(VENV)/.installed-dev ## an S3 server on loopback to try things with, until Ctrl-C [PORT=9000]
	@cd $(dir $(realpath $(firstword $(MAKEFILE_LIST)))) && exec $(abspath $(BIN))/python -m tests.s3_server $(PORT)

test: $(VENV)/.installed-dev ## tests that need minutes, no network and no GPU
	@$(BIN)/python -m pytest -q $(ARGS)

test-all: $(VENV)/.installed-dev ## also the slow ones and those that need a server on loopback
	@$(BIN)/python -m pytest -q -m "not gpu" $(ARGS)

test-s3: $(VENV)/.installed-dev ## the tests with an object store, against Ceph's (root installs Debian's packages)
	@tests/radosgw.sh install
	@VIEWPOINT_TEST_S3=radosgw $(BIN)/python -m pytest -q -m s3 --ignore tests/cluster $(ARGS)

# a KUBECONFIG of the environment does not count: nobody's cluster is tested on by accident
test-cluster: $(VENV)/.installed-dev ## kubectl and pods against the double of a cluster; KUBECONFIG=file: kubectl against that real one
ifeq ($(origin KUBECONFIG),command line)
	@VIEWPOINT_TEST_KUBECONFIG=$(abspath $(KUBECONFIG)) $(BIN)/python -m pytest -q tests/cluster -m cluster $(ARGS)
else
	@$(BIN)/python -m pytest -q tests/cluster -m "slow or not slow" $(ARGS)
endif

test-gpu: $(VENV)/.installed-dev ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -q -m gpu $(ARGS)

check: $(VENV)/.installed-dev ## format, lint, types, layering
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_layering.py

format: $(VENV)/.installed-dev ## rewrite the code in the one format
	@$(BIN)/ruff check --fix-only --select I .
	@$(BIN)/ruff format .

manifests: $(VENV)/.installed-dev ## build and check what k8s/ holds, for every Kubernetes (RENEW=1 renews the golden files)
	@command -v kubectl >/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then echo "Installing Debian's kubernetes-client" >&2; apt-get install -y -q kubernetes-client >/dev/null; \
		else echo "kubectl is missing. On Debian or Ubuntu: sudo apt-get install kubernetes-client" >&2; exit 64; fi; }
	@$(if $(RENEW),$(BIN)/python -m tests.k8s.golden)
	@$(BIN)/python -m pytest -q tests/k8s tests/launcher/test_jobset.py -m "slow or not slow" $(ARGS)

bench: $(VENV)/.installed .venv-bench/.installed ## every benchmark, with its targets
	@missed=; for script in benchmarks/[a-z]*.py; do \
		$(BIN)/python $$script --check --json benchmarks/results/$$(basename $$script .py).json || missed="$$missed $$script"; done; \
		[ -z "$$missed" ] || { echo "Targets missed, or not measured, by$$missed" >&2; exit 1; }

clean: ## remove .venv and caches (runs/ stays)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Viewpoint needs Python 3.11 or newer (zarr 3.1 has no release for older ones); $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..." >&2; exit 64; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then echo "Installing Debian's python3-venv" >&2; apt-get install -y -q python3-venv >/dev/null; \
		else echo "Python's venv module is missing. On Debian or Ubuntu: sudo apt-get install python3-venv" >&2; exit 64; fi; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Viewpoint's packages (torch, DeepSpeed and what they need) into $(VENV): once, about 6 GB, some minutes (log: $(INSTALL_LOG))" >&2
	$(call install,$(PIP),-c constraints.txt -e .,$(VENV))
	@touch $@

# What the stream is measured beside. Not together with the project, beside whose packages only old versions of them go.
.venv-bench: .venv-bench/.installed

.venv-bench/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "Installing the loaders that benchmarks/stream.py measures beside into .venv-bench: once, some 6 GB (log: .venv-bench/install.log)" >&2
	@$(BIN)/python -m venv .venv-bench
	$(call install,.venv-bench/bin/python -m pip --disable-pip-version-check,psutil $$($(BIN)/python -c \
		'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"])'),.venv-bench)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the tools for tests and checks into $(VENV): once, about 200 MB, less than a minute (log: $(INSTALL_LOG))" >&2
	$(call install,$(PIP),-c constraints.txt -e '.[dev]',$(VENV))
	@touch $@
