# Every target makes the virtual environment it needs; only `gpu` runs with the python3 at hand, as it is.
PYTHON ?= python3
VENV := .venv
PINS_VENV := .venv-gpu-pins
RUN := $(VENV)/bin/python

.PHONY: help prefill test test-gpu-pins test-browser aot gpu lint format clean

help:
	@echo "make prefill        compare LLaVA-1.5 with LLaVA-STF, stage by stage (two minutes without a GPU)"
	@echo "make test           every test that this machine can run"
	@echo "make test-gpu-pins  the same with the versions nearest to the GPU machine's"
	@echo "make test-browser   the report page in a headless Chromium, which it installs as root on Debian"
	@echo "make aot            compile every shipped configuration for every GPU and check the generated code"
	@echo "make gpu            on a GPU machine: tests, kernel table, prefill table into bench/results/"
	@echo "make lint           ruff"

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(PINS_VENV)/.installed: setup.py .ci/gpu-pins.txt
	$(PYTHON) -m venv $(PINS_VENV)
	$(PINS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c .ci/gpu-pins.txt -e '.[dev]'
	@touch $@

prefill: $(VENV)/.installed
	$(RUN) -m bench.prefill $(ARGS)

# The interpreter must be chosen before the kernels are imported, so its tests are a process of their own. It runs
# beside the others, one core each (tiny tensors are slower on two threads), and its report follows theirs.
define run_tests
	@mkdir -p .work
	@OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(1) -m pytest tests/interpreter > .work/interpreter.log 2>&1 & interpreter=$$!; \
	trap 'kill $$interpreter 2>/dev/null' INT TERM; \
	status=0; OMP_NUM_THREADS=1 $(1) -m pytest tests --ignore=tests/interpreter || status=1; \
	wait $$interpreter || status=1; cat .work/interpreter.log; exit $$status
endef

test: $(VENV)/.installed
	$(call run_tests,$(RUN))

test-gpu-pins: $(PINS_VENV)/.installed
	$(call run_tests,$(PINS_VENV)/bin/python)

test-browser: $(VENV)/.installed
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	{ test "$$(id -u)" = 0 && command -v apt-get && apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } || \
	{ echo "make test-browser: Chromium is missing and only root on Debian can have it installed here;" \
	       "install it first: apt-get install chromium" >&2; exit 1; }
	STF_BROWSER_TESTS=1 $(RUN) -m pytest tests/browser

aot: $(VENV)/.installed
	$(RUN) -m stf_kernels.aot

gpu:
	$(PYTHON) -m bench.gpu

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(PINS_VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
