# `make chat` and `make test` set up all they need: system packages (as root on Debian), .venv, llama.cpp, the native part.
# What is built already and has not changed is not built again.

# Another Python: make PYTHON=python3.12 ...
PYTHON ?= python3
# More arguments for the command that a target runs: make test ARGS="-k slots"
ARGS ?=
# Tests at once: make test WORKERS=4. A file's tests stay together, for the models that they share.
WORKERS ?= 2

VENV   := .venv
STAMPS := $(VENV)/.stamps
LOGS   := build/logs
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
SETUP  := scripts/setup
# Usage: $(call quietly,label,log name) command
quietly = $(PY) $(SETUP)/quietly.py "$(1)" $(LOGS)/$(2).log

# Kept between builds, so that only changed native sources are compiled.
NATIVE_BUILD := build/native

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help chat test bench build native wheel lint format native-test clean

ifneq ($(filter-out help clean,$(or $(MAKECMDGOALS),help)),)
$(shell sh $(SETUP)/drop_stale_venv.sh $(if $(filter-out file undefined,$(origin PYTHON)),"$(PYTHON)"))
endif

help:
	@echo "make chat         chat with the bundled model; PROMPT=\"...\" answers once"
	@echo "make test         run all tests; ARGS=\"...\" goes to pytest"
	@echo "make bench        measure against stock llama.cpp, on models of 2 and 8 GB that it makes; hours, best as root"
	@echo "make build        set up .venv with pyengine in it, editable"
	@echo "make wheel        put our wheel and that of llama-cpp-python into wheelhouse/"
	@echo "make lint         ruff, mypy, clang-format; make format repairs what they can"
	@echo "make native-test  the native unit tests: plain, ASan + UBSan, TSan"
	@echo "make clean        remove everything made here"

# ---- set up

$(STAMPS)/venv: $(SETUP)/build-tools.txt
	@mkdir -p $(LOGS)
	@sh $(SETUP)/prerequisites.sh "$(PYTHON)" $(LOGS)/apt.log
	@"$(PYTHON)" $(SETUP)/quietly.py "Making .venv" $(LOGS)/venv.log "$(PYTHON)" -m venv $(VENV)
	@$(call quietly,Installing build tools,build-tools) $(PIP) install -r $(SETUP)/build-tools.txt
	@mkdir -p $(STAMPS) && printf '%s\n' "$(CURDIR)" > $@

$(STAMPS)/llama: $(SETUP)/llama-cpp-python.txt $(SETUP)/llama_wheel.py $(STAMPS)/venv
	@wheel=$$($(PY) $(SETUP)/llama_wheel.py) && \
	    $(call quietly,Installing llama-cpp-python,llama) $(PIP) install --force-reinstall --no-deps "$$wheel"
	@touch $@

# Editable: Python files are used where they lie; the native part goes into the environment (see `native`).
$(STAMPS)/pyengine: pyproject.toml $(STAMPS)/llama
	@$(call quietly,Installing pyengine and what it needs,pyengine) \
	    $(PIP) install --no-build-isolation --config-settings=build-dir=$(NATIVE_BUILD) --editable .
	@touch $@

$(STAMPS)/test $(STAMPS)/lint $(STAMPS)/bench: $(STAMPS)/%: $(STAMPS)/pyengine
	@$(call quietly,Installing the $* tools,$*) $(PIP) install "pyengine[$*]"
	@touch $@

native: $(STAMPS)/pyengine
	@$(call quietly,Building the native part,native) sh $(SETUP)/build_native.sh $(PY) $(NATIVE_BUILD)

build: native

# ---- use

export PROMPT
chat: build
	@$(VENV)/bin/pyengine chat $(if $(PROMPT),--prompt "$$PROMPT") $(ARGS)

test: build $(STAMPS)/test
	@$(PY) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# The bundled model with experts of 2 and 8 GB; these and their bundles stay in the cache folder.
bench: build $(STAMPS)/bench
	@$(VENV)/bin/pyengine bench --widened 2144 --widened 8576 --make-bundles --out bench/results \
	    --report docs/benchmark.md $(ARGS)

native-test: $(STAMPS)/test
	@$(PY) -m pytest tests/native $(ARGS)

# ---- give away

# Everything that goes into our wheel. Its data too, but not what Python compiles beside its sources.
WHEEL_INPUTS = CMakeLists.txt pyproject.toml README.md LICENSE THIRD_PARTY_NOTICES.md \
    $(shell find native pyengine gguf_tools scripts/setup -type f ! -name '*.pyc')

wheel: wheelhouse/.done
	@echo "wheelhouse/ installs in an environment of Python 3.10 to 3.13 on a machine like this one:"
	@echo "    python3 -m pip install wheelhouse/*.whl"

wheelhouse/.done: $(STAMPS)/pyengine $(WHEEL_INPUTS)
	@rm -rf wheelhouse
	@$(call quietly,Building the wheel of pyengine,wheel) $(PIP) wheel --no-build-isolation --no-deps \
	    --config-settings=build-dir=build/wheel --wheel-dir wheelhouse .
	@cp "$$($(PY) $(SETUP)/llama_wheel.py)" wheelhouse/
	@touch $@

# ---- check

CPP_FILES = $(wildcard native/include/*.h native/src/*.h native/src/*.cpp tests/native/*.h tests/native/*.cpp)

lint: $(STAMPS)/lint
	@status=0; \
	$(VENV)/bin/ruff check . || status=1; \
	$(VENV)/bin/mypy || status=1; \
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES) || status=1; \
	exit $$status

format: $(STAMPS)/lint
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/clang-format -i $(CPP_FILES)

clean:
	rm -rf .venv build wheelhouse dist .pytest_cache .mypy_cache .ruff_cache
	find pyengine gguf_tools scripts tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
