# make demo   sets everything up and runs RLHF with all roles on this machine
# make test   sets everything up and runs the tests (make test-all: the slow ones too)

PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -c '' 2>/dev/null && echo python3.12 || \
                  (command -v python3.11 >/dev/null 2>&1 && python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3))
BIN := .venv/bin
# Two files of tests at a time: most of their time goes by in starting processes.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
TORCH := torch==2.13.0+cpu

.PHONY: demo test test-all check install lock docs clean

demo: install
	$(BIN)/python -m examples.demo

test: install
	$(PYTEST) -m "not slow and not gpu"

test-all: install
	$(PYTEST) -m "not gpu"

check: install
	$(BIN)/ruff check .
	$(BIN)/mypy

install: .venv/.installed

# --no-deps: the lock names every package, and what it leaves out must stay out (torchvision, torchaudio, torchcodec).
.venv/.installed: requirements/cpu.lock setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 12)) else f"troupe needs Python 3.11 or 3.12, {sys.executable} is {v[0]}.{v[1]}; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps "$(TORCH)" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --no-deps --index-url https://download.pytorch.org/whl/cpu "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/cpu.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Writes the lock from what is installed: for a new version, install it into .venv, run the tests, then this.
lock:
	$(BIN)/python requirements/lock.py > requirements/cpu.lock.new && mv requirements/cpu.lock.new requirements/cpu.lock

docs: install
	$(BIN)/python -m launch.reference > docs/configuration.md

clean:
	rm -rf .venv runs .mypy_cache .ruff_cache .pytest_cache *.egg-info build
