# make install | demo | test | check | bench. Every target sets up .venv first and skips what is already there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test check bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# passive: threads that wait sleep, so a busy machine does not slow the demo down twentyfold
demo: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/spikefit compare recipes/demo.toml strategies=bptt,lean:input,lean:spikes,checkpoint --out runs/demo

# several test processes share the cores, so a thread that waits must not spin
test: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_OPTIONS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) build dist
