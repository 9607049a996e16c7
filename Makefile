# Each target is a thin call of `python -m experiments.COMMAND`. key=value arguments are passed on:
#   make train EXP=moe SCALE=small optim.lr=3e-5
SHELL := /bin/bash
EXP ?= moe
SCALE ?= sample
RECIPE ?= scimult
COMMA := ,
EXTRAS ?= cpu$(if $(filter import,$(MAKECMDGOALS)),$(COMMA)import)
BENCH ?= encoder_cost
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

# The key=value arguments, without make's own variables, each quoted for the shell.
OWN := COMMA FILES EXP SCALE RECIPE EXTRAS BENCH SWEEP SWEEP_ID PARALLEL TRIAL COUNT PYTHON PY VENV ARGS TESTS SHELL MAKEFLAGS MAKEOVERRIDES
given = $(filter command,$(origin $(1)))
quoted = '$(subst ','\'',$(1)=$(value $(1)))'
OVERRIDES = $(foreach v,$(filter-out $(OWN),$(.VARIABLES)),$(if $(call given,$(v)),$(call quoted,$(v))))

.DEFAULT_GOAL := help
TARGETS := help install doctor data import dry-run train sweep agent sync slurm eval reproduce mteb harness mine audit compare report runs embed index find export test test-fast check bench clean
.PHONY: $(TARGETS)

# The words after import are files: make import library.bib output=FOLDER
ifeq (import,$(firstword $(MAKECMDGOALS)))
FILES := $(filter-out $(TARGETS),$(MAKECMDGOALS))
.PHONY: $(FILES)
$(FILES): import ; @:
else
# A word that is not a target is a setting without "=" or with a space in it. Refuse it instead of running something else.
ifneq ($(filter-out $(TARGETS),$(MAKECMDGOALS)),)
$(error unknown target: $(filter-out $(TARGETS),$(MAKECMDGOALS)). Settings are key=value without spaces, or in quotes: \
EXP=moe optim.lr=1e-3 query="two words". Targets: $(TARGETS))
endif
endif

help: ## show this page
	@echo "make TARGET [EXP=experiment] [SCALE=scale] [key=value ...]"
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14
	@echo
	@echo "experiments (EXP=)"
	@for f in $(filter-out experiments/base.yaml,$(wildcard experiments/*.yaml)); do \
		printf '  %-12s%s\n' "$$(basename $$f .yaml)" "$$(sed -n '1s/^# *//p' $$f)"; done
	@echo
	@echo "scales (SCALE=)"
	@for f in $(wildcard experiments/scale/*.yaml); do \
		printf '  %-12s%s\n' "$$(basename $$f .yaml)" "$$(sed -n '1s/^# *//p' $$f)"; done
	@echo
	@echo "sweeps (SWEEP=)"
	@for f in $(wildcard experiments/sweeps/*.yaml); do \
		printf '  %-16s%s\n' "$$(basename $$f .yaml)" "$$(sed -n '1s/^# *//p' $$f)"; done
	@echo
	@echo "recipes (RECIPE=)"
	@for f in $(wildcard experiments/recipes/*.yaml); do \
		printf '  %-12s%s\n' "$$(basename $$f .yaml)" "$$(sed -n '1s/^# *//p' $$f)"; done

# One stamp per set of extras, so that nothing is installed twice.
STAMP := $(VENV)/.installed-$(subst $(eval) ,,$(EXTRAS))
install: $(STAMP) ## create the virtual environment .venv (EXTRAS=cpu or gpu, then any of: hub, import, minilm, mteb, onnx, sentence-transformers, svm, dev)

$(STAMP): setup.cfg constraints.txt pyproject.toml
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; a minute or two)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

data: $(STAMP) ## build data sets from public downloads: make data RECIPE=scimult data.root=FOLDER
	@$(PY) -m experiments.data $(RECIPE) $(OVERRIDES) $(ARGS)

import: $(STAMP) ## turn your papers into training data: make import library.bib output=FOLDER [split=80/10/10]
	@$(PY) -m experiments.import_papers $(if $(FILES),'$(subst ','\'',$(subst $(eval) ,$(COMMA),$(FILES)))') $(OVERRIDES) $(ARGS)

doctor: $(STAMP) ## check the installation and say how to fix it (network=yes)
	@$(PY) -m experiments.doctor $(OVERRIDES) $(ARGS)

dry-run: $(STAMP) ## predict memory and time of an experiment from a few steps: make dry-run EXP=moe SCALE=small
	@$(PY) -m experiments.dry_run $(EXP) scale=$(SCALE) $(OVERRIDES) $(ARGS)

train: $(STAMP) ## train an experiment, or resume it, and print its results: make train EXP=moe
	@$(PY) -m experiments.train $(EXP) scale=$(SCALE) $(OVERRIDES) $(ARGS)

sweep: $(STAMP) ## search settings: make sweep EXP=moe SWEEP=lr [PARALLEL=2] [TRIAL=0] [wandb.mode=online]
	@$(PY) -m experiments.sweep $(EXP) sweep=$(SWEEP) scale=$(SCALE) $(if $(PARALLEL),parallel=$(PARALLEL)) $(if $(TRIAL),trial=$(TRIAL)) $(OVERRIDES) $(ARGS)

agent: $(STAMP) ## run trials of a sweep on W&B: make agent SWEEP_ID=ENTITY/PROJECT/ID [COUNT=1]
	@$(PY) -m experiments.agent sweep_id=$(SWEEP_ID) $(if $(COUNT),count=$(COUNT)) $(OVERRIDES) $(ARGS)

sync: $(STAMP) ## upload offline logs to W&B: make sync [folder=RUN]
	@$(PY) -m experiments.sync $(OVERRIDES) $(ARGS)

slurm: $(STAMP) ## write a SLURM job: make slurm EXP=moe NODES=2 GPUS=8 TIME=04:00:00 [SUBMIT=1] [SEEDS=0,1]
	@$(PY) -m experiments.slurm $(EXP) scale=$(SCALE) $(if $(SWEEP),SWEEP=$(SWEEP)) $(OVERRIDES) $(ARGS)

eval: $(STAMP) ## evaluate models: make eval model=A,B,bm25 [benchmarks=all data.root=FOLDER] [beir=FOLDER task=search] [devices=8]
	@$(PY) -m experiments.evaluate $(OVERRIDES) $(ARGS)

reproduce: $(STAMP) ## compare results with the paper's tables: make reproduce results=FOLDER [system=SciMult-Vanilla]
	@$(PY) -m experiments.reproduce $(OVERRIDES) $(ARGS)

mteb: $(STAMP) ## evaluate a model with mteb: make mteb EXTRAS=cpu,mteb model=M [tasks=SciFact,NFCorpus]
	@$(PY) -m experiments.mteb $(OVERRIDES) $(ARGS)

harness: $(STAMP) ## write files for other evaluation programs: make harness format=scidocs model=M data=FOLDER output=FOLDER
	@$(PY) -m experiments.harness $(OVERRIDES) $(ARGS)

mine: $(STAMP) ## mine hard negatives: make mine EXP=moe model=M output=FOLDER, then make train mining.store=FOLDER
	@$(PY) -m experiments.mine $(EXP) scale=$(SCALE) $(OVERRIDES) $(ARGS)

audit: $(STAMP) ## find evaluation texts in the training data: make audit EXP=moe [beir=FOLDER]
	@$(PY) -m experiments.audit $(EXP) scale=$(SCALE) $(OVERRIDES) $(ARGS)

embed: $(STAMP) ## embed a corpus: make embed model=M task=search input=papers.jsonl output=FOLDER [part=3/8]
	@$(PY) -m experiments.embed $(OVERRIDES) $(ARGS)

index: $(STAMP) ## build a FAISS index of embeddings: make index embeddings=FOLDER output=FILE [kind=ivf]
	@$(PY) -m experiments.index $(OVERRIDES) $(ARGS)

find: $(STAMP) ## find the papers nearest to a text: make find embeddings=FOLDER query="..." [index=FILE]
	@$(PY) -m experiments.find $(OVERRIDES) $(ARGS)

compare: $(STAMP) ## test the difference of two systems: make compare A=RUN B=RUN [metric=ndcg@10]
	@$(PY) -m experiments.compare $(OVERRIDES) $(ARGS)

report: $(STAMP) ## show a run as one HTML page: make report RUN=FOLDER
	@$(PY) -m experiments.report $(OVERRIDES) $(ARGS)

runs: $(STAMP) ## list all runs with their results
	@$(PY) -m experiments.runs $(OVERRIDES) $(ARGS)

export: $(STAMP) ## export a model for other tools: make export model=M [task=search] [onnx=yes] [format=pretrained]
	@$(PY) -m experiments.export $(OVERRIDES) $(ARGS)

test: ## run all tests (TESTS=path for some of them)
	@$(MAKE) --no-print-directory install EXTRAS=cpu,dev MAKEOVERRIDES=
	@$(PY) -m pytest -n 2 $(TESTS) $(ARGS)

test-fast: ## run the quick tests: no subprocesses and no trainings
	@$(MAKE) --no-print-directory install EXTRAS=cpu,dev MAKEOVERRIDES=
	@$(PY) -m pytest -n 2 -m "not slow" $(TESTS) $(ARGS)

check: ## check formatting, lint, sweep files, and the wording of comments and messages
	@$(MAKE) --no-print-directory install EXTRAS=cpu,dev MAKEOVERRIDES=
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(PY) -m experiments.sweep moe check=yes
	@$(PY) -m tests.language -v

bench: $(STAMP) ## measure speed: make bench BENCH=encoder_cost|grad_cache|mining|evaluation|data_scale|embed|sharding|tracking
	@$(PY) -m experiments.bench.$(BENCH) $(OVERRIDES)

clean: ## remove caches, but keep runs and the virtual environment
	@rm -rf .pytest_cache .ruff_cache *.egg-info; find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
