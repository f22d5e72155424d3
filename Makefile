# `make help` lists the targets.

# What a user gives stays text. Make doesn't expand values of its command line, and the shell meets
# them only as environment variables in quotes, "$$PROFILE": `;`, spaces, quotes, backticks and $(...)
# run nothing.
$(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),\
    $(eval override $(name) := $$(value $(name)))$(eval export $(name))))

# The active virtual or conda environment (but never conda's base, which belongs to conda), else .venv.
override CONDA :=
ifneq ($(value CONDA_DEFAULT_ENV),base)
override CONDA := $(value CONDA_PREFIX)
endif
override ENVIRONMENT := $(or $(value VIRTUAL_ENV),$(CONDA),.venv)
export ENVIRONMENT
override RUN_PYTHON := "$$ENVIRONMENT/bin/python"
override OUROBOROS := $(RUN_PYTHON) -m ouroboros

# Options of the command line, each left out where its variable isn't given.
override PROFILE_OR_ALL := $${PROFILE:+--profile="$$PROFILE"}
override PROFILE_OR_TINY := --profile="$${PROFILE:-tiny}"
override JOBS_OPTION := $${JOBS:+--jobs="$$JOBS"}
override CLUSTER_OPTION := $${CLUSTER:+--cluster="$$CLUSTER"}
# $(call flag,FORCE,--force): a variable that is 1 or not given.
override flag = $(if $(filter-out 1,$(value $1)),$\
    $(error error: $1 '$(value $1)': say $1=1 or leave it out),$(if $(value $1),$2))

.PHONY: help reproduce test smoke runs rerun compare checkpoints verify base doctor bench lab site lint clean \
    environment audit-verify audit-kill
.DEFAULT_GOAL := help
# Targets share results/ and use all cores themselves: one after the other, under `make -j` too.
.NOTPARALLEL:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@printf '\n  PROFILE=smoke|tiny|smollm2|small|paper, JOBS=N runs at a time; '
	@printf 'environment: %s\n' "$$ENVIRONMENT"

# Installs the lock, unless this checkout was installed there since the lock changed: an environment
# that two checkouts share is set up anew for each. What can't be used is refused before anything is
# made or installed. torch has no hash, since its builds, for a CPU or for CUDA, differ, nor has what
# the lock doesn't name.
environment:
	@fail() { printf 'error: %s\n' "$$1" >&2; exit 2; }; \
	stamp="$$ENVIRONMENT/.ouroboros-installed"; python="$$ENVIRONMENT/bin/python"; \
	case "$$ENVIRONMENT" in *[[:space:]]*) \
	    fail "environment '$$(printf %s "$$ENVIRONMENT" | tr '\n' ' ')': its path holds a space"; esac; \
	if [ "$$(cat "$$stamp" 2>/dev/null)" = "$$(pwd -P)" ] && \
	    [ -z "$$(find requirements.lock .requirements.hashes pyproject.toml -newer "$$stamp")" ]; then exit 0; fi; \
	if [ ! -x "$$python" ] && [ "$$ENVIRONMENT" != .venv ]; then \
	    fail "environment '$$ENVIRONMENT': no bin/python there; deactivate it, or make it anew"; fi; \
	first="$$python"; [ -x "$$first" ] || first="$${PYTHON:-python3}"; \
	command -v "$$first" >/dev/null || \
	    fail "python '$$first': not found; name another: make PYTHON=python3.11 ..."; \
	"$$first" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    fail "python '$$first': no Python 3.11 or newer; name another: make PYTHON=python3.11 ..."; \
	[ "$$(sed '/^#/d; /^torch==/d' requirements.lock)" = "$$(sed -n 's/^\([a-z][^ ]*\).*/\1/p' .requirements.hashes)" ] || \
	    fail "requirements.lock: .requirements.hashes has other versions; tests/helpers/lock_hashes.py writes it"; \
	[ -x "$$python" ] || "$$first" -m venv .venv || exit; \
	"$$python" -m pip --version >/dev/null 2>&1 || \
	    fail "environment '$$ENVIRONMENT': no pip; add it ($$python -m ensurepip) or remove the folder"; \
	echo "installing requirements.lock into $$ENVIRONMENT"; \
	export PIP_DISABLE_PIP_VERSION_CHECK=1; \
	"$$python" -m pip install --quiet --no-deps --require-hashes -r .requirements.hashes && \
	"$$python" -m pip install --quiet -r requirements.lock && \
	"$$python" -m pip install --quiet --no-deps --no-build-isolation -e . && \
	pwd -P > "$$stamp"

ifeq ($(value PROFILE),smoke)
reproduce: smoke
else
reproduce: environment ## raw logs -> every table, figure and verdict (of PROFILE, or of all)
	$(OUROBOROS) reproduce $(PROFILE_OR_ALL)
endif

test: environment ## the tests
	OMP_NUM_THREADS=1 $(RUN_PYTHON) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

smoke: environment ## everything from nothing at the smallest scale: pretrain, cut, train every arm, derive
	$(OUROBOROS) base --profile=smoke
	$(OUROBOROS) runs --profile=smoke $(JOBS_OPTION)
	$(OUROBOROS) tour --profile=smoke
	$(OUROBOROS) reproduce --profile=smoke

runs: environment ## make the runs of PROFILE that are missing; DRY_RUN=1: what they need; CLUSTER=slurm
	$(OUROBOROS) runs $(PROFILE_OR_TINY) $(JOBS_OPTION) $(CLUSTER_OPTION) $(call flag,DRY_RUN,--dry-run)

rerun: environment ## make one committed run again and compare with its log: make rerun RUN=<id>
	$(OUROBOROS) rerun $(PROFILE_OR_TINY) -- $${RUN:+"$$RUN"}

compare: environment ## set an arm beside Controller, static and LoRA: make compare ARM=<name or YAML file>
	$(OUROBOROS) compare $(PROFILE_OR_TINY) $(JOBS_OPTION) $(call flag,DRY_RUN,--dry-run) -- $${ARM:+"$$ARM"}

checkpoints: environment ## score the committed checkpoints anew, continue the prompts
	$(OUROBOROS) checkpoints $(PROFILE_OR_TINY)

verify: environment ## derive the same again, elsewhere, and compare with what is committed
	$(OUROBOROS) verify $(PROFILE_OR_ALL)

audit-verify: environment ## change every committed cell, number, verdict and hash in turn: is each named? 8 min
	$(RUN_PYTHON) tests/helpers/drift.py

audit-kill: environment ## kill run, sweep, base and reproduce 100 times at random: do all end the same? 8 min
	OMP_NUM_THREADS=1 KILLS=20 $(RUN_PYTHON) -m pytest -q tests/test_resume.py -k killed_at
	OMP_NUM_THREADS=1 KILLS=40 $(RUN_PYTHON) -m pytest -q tests/test_faults.py -k killed
	OMP_NUM_THREADS=1 KILLS=40 $(RUN_PYTHON) -m pytest -q tests/test_reproduce.py -k killed

base: environment ## pretrain or fetch the base of PROFILE, unless it is there; FORCE=1: again; WHEEL=file
	$(OUROBOROS) base $(PROFILE_OR_TINY) $(call flag,FORCE,--force) $${WHEEL:+--wheel="$$WHEEL"}

doctor: environment ## say what of this machine differs from the lock and the logs' machines
	$(OUROBOROS) doctor

bench: environment ## time conversion and generation against their alternatives; run nothing beside it
	$(OUROBOROS) bench

lab: environment ## open the notebooks in JupyterLab
	$(RUN_PYTHON) -m jupyter lab notebooks

# What is installed beside the lock changes nothing of it; once it is there, no network is asked.
site: environment ## README, docs, claims, executed notebooks and logs as a site: build/site/index.html
	$(RUN_PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r docs/site/site.hashes
	rm -rf build/site build/doctrees
	$(RUN_PYTHON) -m sphinx -q -W --keep-going -c docs/site -d build/doctrees . build/site

lint: environment ## ruff, and: no notebook holds outputs
	$(RUN_PYTHON) -m ruff check .
	$(RUN_PYTHON) -m nbstripout --verify --keep-id notebooks/*.ipynb

clean: ## remove caches and what `make smoke` made; the environment and committed results stay
	rm -rf .cache .hypothesis .pytest_cache .ruff_cache build *.egg-info results/smoke figures/smoke
	find ouroboros tests notebooks -name __pycache__ -prune -exec rm -rf {} +
