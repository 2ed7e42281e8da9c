PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint study study-tables soak fuzz guarantees overhead bench-speed clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/ready ## make a model, make it forget some people, show the result
	$(BIN)/lorasure demo

test: .venv/ready ## the whole test suite, two tests at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/ready ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

study: .venv/ready ## every start with every loss on the small TOFU models: tuned alike, five seeds, attacked (hours)
	$(BIN)/python benchmarks/quality/study.py

study-tables: .venv/ready ## the tables of docs/study.md and the README from what is stored
	$(BIN)/python benchmarks/quality/study.py tables

soak: .venv/ready ## fifty random kills of one run, continued after each
	$(BIN)/python benchmarks/reliability/soak.py

fuzz: .venv/ready ## damaged inputs for every reader, 200,000 each
	$(BIN)/python benchmarks/reliability/fuzz.py

guarantees: .venv/ready ## the table of injected faults in docs/guarantees.md
	$(BIN)/python -m pytest --faults=benchmarks/results/faults.json
	$(BIN)/python benchmarks/reliability/guarantees.py

overhead: .venv/ready ## the share of a run's time that goes into its guards
	$(BIN)/python benchmarks/reliability/overhead.py

bench-speed: .venv/ready ## against the published scripts and what is typical today
	$(BIN)/python benchmarks/speed/bench.py

clean:
	rm -rf .venv build dist
