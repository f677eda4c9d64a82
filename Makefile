# Each target works alone on a clean clone: it makes .venv and installs what it needs.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# CI's versions; `make test-latest` takes the newest that pyproject.toml allows
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt
PIP_GRADIO := $(BIN)/python -m pip install --quiet -c $(VENV)/constraints-gradio.txt
NEWEST := $(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager

.PHONY: quickstart gpu test check test-latest fuzz kill-test audit ablation figures lint docs install clean

quickstart: install        ## the whole method on the built-in world, with a report (output/quickstart)
	$(BIN)/python tools/quickstart.py --output-dir output/quickstart

test: install              ## the test suite, in WORKERS processes of about a GB each
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: lint                ## the loop of editing: lint and the fast tests, about a minute
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not slow"

fuzz: install              ## 10,000 broken and hostile files (a fixed few hundred of them are part of the tests)
	VILD_FUZZ=nightly $(BIN)/python -m pytest -q tests/fuzz

test-latest:               ## the same with the newest versions that are allowed, in a second environment; to be scheduled
	rm -f .venv-latest/.installed
	$(MAKE) test VENV=.venv-latest PIP='$$(NEWEST)' PIP_GRADIO='$$(NEWEST)'

audit: install             ## known vulnerabilities of what is installed; asks pypi.org, and fails where it does not answer
	test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/pip install --quiet pip-audit; }
	@# without --strict a package that could not be asked about counts as clean; Detectron2, of a file, is on no index
	$(BIN)/python -m pip freeze --all --exclude-editable | grep -v ' @ ' > .venv-audit/installed.txt
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip --requirement .venv-audit/installed.txt

ablation: install          ## all variants and controls, three seeds (output/glyphs)
	$(BIN)/python tools/ablate.py --grid configs/Glyphs/ablations/paper.yaml --output-dir output/glyphs

figures: install           ## every measured table and picture of README and docs whose code has changed: many hours
	$(BIN)/python tools/figures.py

gpu: install               ## on a GPU, in ten minutes: what is only expected without one (output/gpu/gpu.md); started again, it continues
	$(BIN)/python tools/gpu_report.py --output-dir output/gpu

kill-test: install         ## 50 kills (SIGKILL) at random moments, each followed by the same command: nothing may be lost
	PYTHONPATH=tools $(BIN)/python -m tests.kills --output-dir output/kill-test

lint: install .venv-docs/.installed
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/figures.py --check
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs --quiet build --strict

docs: .venv-docs/.installed  ## the documentation, to be read while it is edited (http://127.0.0.1:8000)
	.venv-docs/bin/mkdocs serve

.venv-docs/.installed: docs/requirements.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet -r docs/requirements.txt
	@touch $@

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt vild/install_detectron2.py
	@echo "installing into $(VENV): 6.6 GB, a few minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) 'setuptools<82' wheel
	$(PIP) -e '.[dev]'
	@# gradio asks for Pillow < 13; it runs with 13, with which our crops are compared to the last bit
	grep -v '^pillow==' constraints.txt > $(VENV)/constraints-gradio.txt
	$(PIP_GRADIO) 'gradio>=6,<7' 'pillow<13'
	$(PIP) --no-deps --upgrade pillow
	@# lvis-api, what our LVIS figures are compared with; its dependencies (opencv-python, Cython) are not needed
	$(BIN)/python -m pip install --quiet --no-deps lvis==0.5.3
	$(BIN)/python vild/install_detectron2.py
	@touch $@

clean:
	rm -rf $(VENV) .venv-latest .venv-audit .venv-docs output
