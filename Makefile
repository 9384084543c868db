# The front door. Everything goes through a virtual environment in .venv, made from the lock when it is missing.
PYTHON ?= $(firstword $(foreach name,python3.11 python3 python,$(shell $(name) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $(name))) python3.11)
PROFILE ?= params/dry_run.yaml
RUN := $(shell sed -n 's/^run: *//p' $(PROFILE) 2>/dev/null)
BIN := .venv/bin
export DO_NOT_TRACK = 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help profile run test slow lab book env clean lint
help:
	@echo "make run    the dry run on real text, sealed, and its book (PROFILE=params/smoke.yaml for a quick one)"
	@echo "make test   lint, types and the whole test suite, notebooks included"
	@echo "make slow   what takes long: every layout, fault, golden loss and runbook command (hours)"
	@echo "make lab    JupyterLab on the notebooks"
	@echo "make book   the book of the run that PROFILE names"
	@echo "make clean  remove the environment, caches and built books; runs in outbox/ stay"

profile:
	@test -f "$(PROFILE)" || { echo "there is no profile $(PROFILE); there are: $(wildcard params/*.yaml)"; exit 1; }

run: profile env
	stackpkg run $(PROFILE)
	stackpkg verify outbox/$(RUN)
	stackpkg book outbox/$(RUN)
	@echo "status: $(BIN)/stackpkg status outbox/$(RUN)"

test: env lint
	python -m pytest --durations=15

slow: env
	python -m pytest -m slow --durations=15

lint: env
	ruff check .
	ruff format --check .
	mypy

lab: env
	jupyter lab notebooks --LabApp.default_url=/lab/tree/README.md

book: profile env
	stackpkg book outbox/$(RUN)

env: .venv/.complete

# torch first, by pip: a looser requirement would pull gigabytes of CUDA where no GPU is. The rest through uv, which
# installs the lock in seconds. The environment counts only when it is complete.
.venv/.complete: requirements.lock.txt pyproject.toml notebooks/.overrides.json
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is missing: install it, or give its path: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@command -v git >/dev/null || { echo "git is missing: install git"; exit 1; }
	@command -v ssh-keygen >/dev/null || { echo "ssh-keygen is missing: install openssh-client (signing and verifying need it)"; exit 1; }
	@echo "[1/3] a virtual environment in .venv"
	@$(PYTHON) -m venv --clear .venv || { echo "venv failed: on Debian install python3.11-venv"; exit 1; }
	@echo "[2/3] torch"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 uv
	@echo "[3/3] the locked packages"
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@mkdir -p .venv/share/jupyter/lab/settings && cp notebooks/.overrides.json .venv/share/jupyter/lab/settings/overrides.json
	@touch $@

clean:
	rm -rf .venv book/_build .pytest_cache .ruff_cache .mypy_cache
	find stackpkg tests book -name __pycache__ -type d -exec rm -rf {} +
