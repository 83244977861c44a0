# Two commands for newcomers: make demo, make test. Everything goes into .venv; nothing else is touched,
# but for Debian's package of Fashion-MNIST where apt and root are there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GARMENTS := /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz

.PHONY: demo test lint wheel docs docs-build minimum audit bench garments browser

demo: $(VENV)/installed garments
	$(BIN)/agglom demo

test: $(VENV)/installed-dev $(VENV)/installed-axe $(VENV)/installed-transformers garments browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2  # two processes of one thread; with more threads they fight

lint: $(VENV)/installed-dev
	$(BIN)/ruff check agglom teachers students adaptors probes configs tests benchmarks docs/*.py
	$(BIN)/ruff format --check agglom teachers students adaptors probes configs tests benchmarks docs/*.py
	$(BIN)/mypy

# About 10 minutes; numbers that mean something need a machine that does nothing else.
bench: $(VENV)/installed-dev
	mkdir -p runs/bench
	for name in step cache data scale startup; do \
		OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py --quick --json runs/bench/$$name.json || exit 1; \
	done
	$(BIN)/python benchmarks/table.py runs/bench

# The documentation, at http://127.0.0.1:8000, built anew when a page changes.
docs: $(VENV)/installed-dev
	$(BIN)/python -m mkdocs serve --strict

docs-build: $(VENV)/installed-dev
	$(BIN)/python -m mkdocs build --strict --site-dir site

wheel: $(VENV)/installed-dev
	$(BIN)/python tests/wheel_check.py

# The lowest versions that pyproject.toml declares (torch aside), in .venv-minimum, under a quick part of the tests.
minimum: $(VENV)/installed-dev
	$(BIN)/python tests/minimum.py .venv-minimum

# Asks OSV, which knows the published advisories; says so and ends with 2 where it can't be reached.
audit: $(VENV)/installed-dev
	test -x $(VENV)/audit/bin/pip-audit \
	|| { $(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/python -m pip install --quiet "pip-audit>=2.7"; }
	$(BIN)/python tests/audit.py $(VENV)/audit/bin/pip-audit $(VENV)/requirements.lock

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# axe-core checks the report's accessibility. The package carries it, and would bring a browser of its own along.
$(VENV)/installed-axe: $(VENV)/installed-dev
	-$(BIN)/python -m pip install --quiet --no-deps axe-playwright-python==0.1.8 && touch $@

# The tests load exports through transformers' TimmWrapper. It stays out of the environment, because torchmetrics would
# import it in every command; its own requirements are there without it.
$(VENV)/installed-transformers: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/transformers "transformers>=4.48" "tokenizers>=0.22"
	touch $@

# The report is tested in Chromium where there is one, or where Debian's can be installed; else these tests are skipped.
browser:
	@for name in chromium chromium-browser google-chrome chrome; do command -v $$name >/dev/null && exit 0; done; \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get install -y -qq chromium >/dev/null 2>&1 \
		|| { apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1 \
		|| echo "could not install chromium; its tests are skipped"; \
	fi

# The demo downloads Fashion-MNIST (30 MB) by itself where this can't provide it.
garments:
	@if [ ! -e $(GARMENTS) ] && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get install -y -qq dataset-fashion-mnist >/dev/null 2>&1 \
		|| { apt-get update -qq && apt-get install -y -qq dataset-fashion-mnist; } >/dev/null 2>&1 \
		|| echo "could not install dataset-fashion-mnist; trying the download"; \
	fi
