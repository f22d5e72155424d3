# `make help` lists the targets.

PROFILE ?= tiny
JOBS ?= 2
CLUSTER ?= local
PYTHON ?= python3

# The active virtual or conda environment (but never conda's base, which belongs to conda), else .venv.
CONDA := $(if $(filter base,$(CONDA_DEFAULT_ENV)),,$(CONDA_PREFIX))
ENV := $(or $(VIRTUAL_ENV),$(CONDA),.venv)
RUN_PYTHON := $(ENV)/bin/python
OUROBOROS := $(RUN_PYTHON) -m ouroboros

# The stamp names the checkout that was installed: an environment shared by two of them is set up anew for each.
STAMP := $(ENV)/.ouroboros-installed
ifneq ($(shell cat "$(STAMP)" 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

.PHONY: help reproduce test smoke runs rerun verify base bench lab lint clean
.DEFAULT_GOAL := help
# Targets share results/ and use all cores themselves: one after the other, under `make -j` too.
.NOTPARALLEL:

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PROFILE=smoke|tiny|small|paper (now $(PROFILE)), JOBS=N runs at a time (now $(JOBS)); environment: $(ENV)"

$(STAMP): requirements.lock pyproject.toml
	@$(or $(wildcard $(RUN_PYTHON)),$(PYTHON)) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "error: " + sys.executable + " is older than Python 3.11; name another: make PYTHON=python3.11 ...")'
	@test -x $(RUN_PYTHON) || $(PYTHON) -m venv $(ENV)
	$(RUN_PYTHON) -m pip install --quiet -r requirements.lock
	$(RUN_PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	@echo "$(CURDIR)" > $@

reproduce: $(if $(filter smoke,$(PROFILE)),smoke,$(STAMP)) ## raw logs -> every table, figure and verdict of PROFILE
	$(if $(filter smoke,$(PROFILE)),,$(OUROBOROS) reproduce --profile $(PROFILE))

test: $(STAMP) ## the tests
	OMP_NUM_THREADS=1 $(RUN_PYTHON) -m pytest -q -n 2 --dist loadfile

smoke: $(STAMP) ## everything from nothing at the smallest scale: pretrain, cut, train every arm, derive
	$(OUROBOROS) base --profile smoke
	$(OUROBOROS) runs --profile smoke --jobs $(JOBS)
	$(OUROBOROS) tour --profile smoke
	$(OUROBOROS) reproduce --profile smoke

runs: $(STAMP) ## make the runs of PROFILE that are missing; DRY_RUN=1: what they need; CLUSTER=slurm
	$(OUROBOROS) runs --profile $(PROFILE) --jobs $(JOBS) --cluster $(CLUSTER) $(if $(DRY_RUN),--dry-run)

rerun: $(STAMP) ## make one committed run again and compare with its log: make rerun RUN=<id>
	$(OUROBOROS) rerun $(if $(RUN),'$(RUN)') --profile $(PROFILE)

verify: $(STAMP) ## derive everything again, elsewhere, and compare with what is committed
	$(OUROBOROS) verify --profile $(PROFILE)

base: $(STAMP) ## pretrain or fetch the base model of PROFILE, unless it is there; FORCE=1: again; WHEEL=file
	$(OUROBOROS) base --profile $(PROFILE) $(if $(FORCE),--force) $(if $(WHEEL),--wheel '$(WHEEL)')

bench: $(STAMP) ## time conversion and generation against their alternatives; run nothing beside it
	$(OUROBOROS) bench

lab: $(STAMP) ## open the notebooks in JupyterLab
	$(RUN_PYTHON) -m jupyter lab notebooks

lint: $(STAMP) ## ruff, and: no notebook holds outputs
	$(RUN_PYTHON) -m ruff check .
	$(RUN_PYTHON) -m nbstripout --verify notebooks/*.ipynb

clean: ## remove caches and what `make smoke` made; the environment and committed results stay
	rm -rf .cache .hypothesis .pytest_cache .ruff_cache build *.egg-info results/smoke figures/smoke
	find ouroboros tests notebooks -name __pycache__ -prune -exec rm -rf {} +
