# Two commands for newcomers: make demo, make test. Everything goes into .venv; nothing else is touched,
# but for Debian's package of Fashion-MNIST where apt and root are there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GARMENTS := /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz

.PHONY: demo test lint wheel bench garments

demo: $(VENV)/installed garments
	$(BIN)/agglom demo

test: $(VENV)/installed-dev garments
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2  # two processes of one thread; with more threads they fight

lint: $(VENV)/installed-dev
	$(BIN)/ruff check agglom teachers students adaptors probes configs tests benchmarks
	$(BIN)/ruff format --check agglom teachers students adaptors probes configs tests benchmarks
	$(BIN)/mypy

wheel: $(VENV)/installed-dev
	$(BIN)/python tests/wheel_check.py

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# The demo downloads Fashion-MNIST (30 MB) by itself where this can't provide it.
garments:
	@if [ ! -e $(GARMENTS) ] && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get install -y -qq dataset-fashion-mnist >/dev/null 2>&1 \
		|| { apt-get update -qq && apt-get install -y -qq dataset-fashion-mnist; } >/dev/null 2>&1 \
		|| echo "could not install dataset-fashion-mnist; trying the download"; \
	fi
