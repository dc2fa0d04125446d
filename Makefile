# `make` lists the targets. Everything runs in .venv, which each target that needs it builds and keeps up to date.
# Another interpreter: make PYTHON=python3.12 setup

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
QUANTISED := .venv-quantised
BENCH := .venv-bench
GPU := .venv-gpu
OLDEST := .venv-oldest
# without the files that expect the names of modules, or the chat templates, of the newest transformers
OLDEST_TESTS := tests/recipe tests/core tests/train/test_train_folder.py tests/tasks/text tests/tasks/test_token_classification.py \
	tests/tasks/test_question_answering.py tests/cli/test_generate.py --ignore tests/core/test_core_saved_modules.py \
	--ignore tests/core/test_core_targets.py --ignore tests/tasks/text/test_mask_matrix.py
SITE := .venv-site
# a test file stays in one process, since its tests share what they made
TWO := --numprocesses 2 --dist loadfile
MODEL := models/SmolLM2-135M-Instruct

# or else each process of each run rewrites the asserts of all tests
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup fmt lint type test test-all test-gpu test-oldest torture docs docs-check docs-site licences dist bench check quickstart clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "  %-12s %s\n", $$1, $$2 }'

setup: $(STAMP) ## build .venv with the package and the developer tools, where pyproject.toml changed

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "setup: '$(PYTHON)' was not found; install Python 3.11 to 3.13, or name it: make PYTHON=python3.12 setup" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "setup: $$($(PYTHON) --version 2>&1) is not a version that it takes; name Python 3.11 to 3.13: make PYTHON=python3.12 setup" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "setup: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "setup: installing into .venv; the first time takes some minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $@

# torchao speaks up whenever transformers is imported, so it has a place of its own; so have libraries that import peft or read its files, and trackers
$(QUANTISED)/.installed: pyproject.toml
	@test -x $(QUANTISED)/bin/pip || $(PYTHON) -m venv $(QUANTISED)
	@echo "test-all: installing into $(QUANTISED)"
	@$(QUANTISED)/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[dev,bitsandbytes,deepspeed,torchao,tensorboard,wandb,mlflow,trackio]' trl sentence-transformers diffusers mistralrs xllamacpp
	@touch $@

# with TRL, which is measured too
$(BENCH)/.installed: pyproject.toml
	@test -x $(BENCH)/bin/pip || $(PYTHON) -m venv $(BENCH)
	@echo "bench: installing into $(BENCH)"
	@$(BENCH)/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[dev,bitsandbytes]' trl
	@touch $@

# with the packages that only a GPU uses, and the peers
$(GPU)/.installed: pyproject.toml
	@test -x $(GPU)/bin/pip || $(PYTHON) -m venv $(GPU)
	@echo "gpu: installing into $(GPU)"
	@$(GPU)/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[dev,bitsandbytes,deepspeed,liger]' trl
	@touch $@

# with the lower bounds of pyproject.toml; --constraint bounds what the extras and peft bring too. Not the developer
# tools: a linter that wants a newer click would leave no version of it
$(OLDEST)/.installed: pyproject.toml tests/oldest.txt
	@test -x $(OLDEST)/bin/pip || $(PYTHON) -m venv $(OLDEST)
	@echo "test-oldest: installing into $(OLDEST)"
	@$(OLDEST)/bin/python -m pip install --disable-pip-version-check --quiet --constraint tests/oldest.txt --editable '.[all]' peft pytest pytest-timeout pytest-xdist hypothesis jsonschema
	@touch $@

$(SITE)/.installed: pyproject.toml
	@test -x $(SITE)/bin/pip || $(PYTHON) -m venv $(SITE)
	@echo "docs-site: installing into $(SITE)"
	@$(SITE)/bin/python -m pip install --disable-pip-version-check --quiet 'mkdocs-material>=9.6'
	@touch $@

fmt: $(STAMP) ## format the code, and mend what ruff can
	@$(BIN)/ruff check --fix-only --quiet
	@$(BIN)/ruff format

lint: $(STAMP) ## ruff, the layers of the package, spelling
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/lint-imports
	@$(BIN)/codespell peftcli docs configs benchmarks README.md CONTRIBUTING.md CHANGELOG.md

type: $(STAMP) ## mypy
	@$(BIN)/mypy

test: $(STAMP) ## the tests that need neither patience, a GPU nor the network
	@$(BIN)/pytest $(TWO) -m "not slow and not gpu and not network"

test-all: $(STAMP) $(QUANTISED)/.installed ## the slow tests too, those that need bitsandbytes and torchao, and torture; takes hours
	@command -v chromium google-chrome >/dev/null || echo "test-all: no Chromium here, so nobody looks at inspect's page; on Debian: apt install chromium" >&2
	@$(BIN)/pytest $(TWO) -m "not gpu and not network"
	@$(QUANTISED)/bin/pytest -m "not gpu and not network" tests/models tests/recipes tests/train/test_train_optim.py tests/train/test_train_trackers.py tests/train/test_train_zero.py tests/train/test_train_sharded.py tests/train/test_train_machines.py -k "models or qlora or optim or trackers or zero or quantised"
	@$(QUANTISED)/bin/pytest -m "not gpu and not network" tests/interop/test_libraries.py
	@$(QUANTISED)/bin/pytest -m "not gpu and not network" tests/interop/test_guides_in_full.py -k int8
	@$(MAKE) torture

test-gpu: $(GPU)/.installed ## the tests that need a GPU
	@$(GPU)/bin/pytest -m gpu

test-oldest: $(OLDEST)/.installed ## the tests of recipes, core, tasks and runs with the lowest versions that pyproject.toml allows
	@$(OLDEST)/bin/pytest $(TWO) -W 'ignore:`torch.jit.script`:DeprecationWarning' -m "not slow and not gpu and not network" $(OLDEST_TESTS)

torture: $(STAMP) ## try to break every promise of docs/reliability.md, and write that page; takes about three hours
	@command -v strace >/dev/null || { echo "torture: needs strace; on Debian: apt install strace" >&2; exit 1; }
	@$(BIN)/python tests/torture

docs: $(STAMP) ## write the recipe's JSON Schema and the reference pages anew
	@$(BIN)/peftcli schema > recipe.schema.tmp && mv recipe.schema.tmp peftcli/recipe.schema.json
	@$(BIN)/python docs/generate.py
	@$(BIN)/python docs/importing.py
	@$(BIN)/python docs/many_gpus.py

docs-check: $(STAMP) ## fail when they are stale
	@$(BIN)/peftcli schema | diff - peftcli/recipe.schema.json || { echo "peftcli/recipe.schema.json is stale: run 'make docs'" >&2; exit 1; }
	@$(BIN)/python docs/generate.py --check
	@$(BIN)/python docs/importing.py --check

docs-site: $(SITE)/.installed ## build the documentation as a site, in build/site; needs no network
	@$(SITE)/bin/python docs/site build/site

licences: $(STAMP) ## write docs/licences.md from the packages in .venv
	@$(BIN)/python docs/licences.py

dist: $(STAMP) ## build the wheel and the sdist, in dist
	@$(BIN)/python -m build --outdir dist

bench: $(BENCH)/.installed ## measure against peers, and write docs/performance.md; takes hours, or PARTS="logits" of it; RESULTS=mine.json: all anew
	@$(BENCH)/bin/python configs/quickstart/fetch_model.py $(MODEL)
	@$(BENCH)/bin/python benchmarks $(PARTS) $(if $(RESULTS),--results $(RESULTS))

check: lint type test docs-check ## everything that CI runs

quickstart: $(STAMP) ## fetch a small chat model, fine-tune it, and show what it learnt
	@$(BIN)/python configs/quickstart/fetch_model.py $(MODEL)
	@QUICKSTART_MODEL=$(MODEL) $(BIN)/peftcli train configs/quickstart.yaml
	@printf '\n=== The prompt: a function that was not trained on\n'; cat configs/quickstart/prompt.txt
	@printf '\n=== Without the adapter\n'
	@$(BIN)/peftcli generate outputs/quickstart --no-adapter --max-new-tokens 96 --prompt "$$(cat configs/quickstart/prompt.txt)"
	@printf '\n=== With the adapter\n'
	@$(BIN)/peftcli generate outputs/quickstart --max-new-tokens 96 --prompt "$$(cat configs/quickstart/prompt.txt)"

clean: ## remove caches and build leftovers; .venv, models/ and outputs/ stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis recipe.schema.tmp
	@find peftcli tests benchmarks docs configs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
