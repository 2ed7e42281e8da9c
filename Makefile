PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench soak clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/ready ## make a model, make it forget some people, show the result
	$(BIN)/lorasure demo

test: .venv/ready ## the whole test suite
	$(BIN)/python -m pytest

lint: .venv/ready ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/ready ## forgetting on the small TOFU models: every initialisation, three seeds
	$(BIN)/python benchmarks/quality/tofu_mini.py

soak: .venv/ready ## fifty random kills of one run, continued after each
	$(BIN)/python benchmarks/reliability/soak.py

clean:
	rm -rf .venv build dist
