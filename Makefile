# Each target works alone on a clean clone: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test fuzz kill-test ablation lint install clean

quickstart: install        ## the whole method on the built-in world, with a report (output/quickstart)
	$(BIN)/python tools/quickstart.py --output output/quickstart

test: install              ## the test suite
	$(BIN)/python -m pytest -q

fuzz: install              ## 10,000 broken and hostile files (a fixed few hundred of them are part of the tests)
	VILD_FUZZ=nightly $(BIN)/python -m pytest -q tests/fuzz

ablation: install          ## all variants and controls, three seeds (output/ablation)
	$(BIN)/python tools/ablate.py --grid configs/Glyphs/ablations/paper.yaml --output output/ablation

kill-test: install         ## SIGKILL at 50 random moments, the same command again: nothing may be lost (output/kill-test)
	$(BIN)/python tools/kill_test.py --output output/kill-test

lint: install
	$(BIN)/ruff check .

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt tools/install_detectron2.py
	@echo "installing into $(VENV): about 3 GB, a few minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt 'setuptools<82' wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@# gradio asks for Pillow < 13; it runs with 13, with which our crops are compared to the last bit
	$(BIN)/python -m pip install --quiet gradio==6.31.0 'pillow<13'
	$(BIN)/python -m pip install --quiet --no-deps pillow==13.0.0
	@# lvis-api, what our LVIS figures are compared with; its dependencies (opencv-python, Cython) are not needed
	$(BIN)/python -m pip install --quiet --no-deps lvis==0.5.3
	$(BIN)/python tools/install_detectron2.py
	@touch $@

clean:
	rm -rf $(VENV) output
