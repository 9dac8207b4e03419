# make demo: the whole system on two photographs and toy weights. make test: the tests. Both build .venv first.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3
TORCH := $(shell grep -i '^torch==' constraints.txt)

.PHONY: demo test lint clean

demo: $(VENV)/.demo-installed
	$(BIN)/ipt2v demo

# The tests on SLURM mostly wait, so they run beside the others; their output comes when they are through. A shell's background
# processes ignore Ctrl-C, which one of them sends.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.test-installed slurm-packages debian-packages lint
	@env --default-signal=INT $(BIN)/python -m pytest -m slurm > .slurm_tests.log 2>&1 & on_slurm=$$!; \
	$(BIN)/python -m pytest -m "not slurm"; rest=$$?; \
	wait $$on_slurm; on_slurm=$$?; cat .slurm_tests.log; \
	[ $$rest = 0 ] && [ $$on_slurm = 0 ]

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes first and alone: anything that pulled it in would take its newest build, with gigabytes of CUDA
$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch-installed: constraints.txt | $(VENV)/bin/pip
	$(BIN)/pip install --quiet $(TORCH)
	touch $@

$(VENV)/.demo-installed: setup.cfg constraints.txt $(VENV)/.torch-installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.test-installed: setup.cfg constraints.txt $(VENV)/.torch-installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# SLURM's tests need its daemons; only root can install them
.PHONY: slurm-packages
slurm-packages:
	@if command -v slurmctld slurmd munged slurmdbd mariadbd >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends $$(cat slurm/apt.txt); \
	else \
		echo "SLURM is not installed, and installing it needs root: its tests will be skipped."; \
		echo "For all tests: sudo apt-get install --no-install-recommends $$(tr '\n' ' ' < slurm/apt.txt)"; \
	fi

# likewise the tests that open the report's page in Chromium, and packages with Debian's own tools
.PHONY: debian-packages
debian-packages:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null \
		&& command -v ffmpeg >/dev/null && command -v unzip >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends $$(cat tests/apt.txt); \
	else \
		echo "Chromium, ffmpeg or unzip is not installed, and installing needs root: their tests will be skipped."; \
		echo "For all tests: sudo apt-get install --no-install-recommends $$(tr '\n' ' ' < tests/apt.txt)"; \
	fi

clean:
	rm -rf $(VENV) demo .slurm_tests.log .pytest_cache .mypy_cache .ruff_cache *.egg-info
