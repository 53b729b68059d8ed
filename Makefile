# make demo: a virtual environment with the tested packages, the extension, then quick_demo.py.
# make test: the same, then the tests on the CPU. make test-gpu: the tests of a CUDA card.
# make mutants: plants faults in a copy of the tree and shows which test catches each.
# PY=python3 (any interpreter) uses the environment you already have instead of making one.
VENV ?= .venv
ifeq ($(origin PY), undefined)
PY := $(VENV)/bin/python
SETUP := $(VENV)/.installed
endif

# The interpreter's full path: the build runs in another folder.
PYTHON_PATH = $(if $(SETUP),$(abspath $(PY)),$(PY))
CSRC := src/cuda/csrc
HAS_CURAND = $(PY) -c "import glob, sysconfig as s, sys; sys.exit(not glob.glob(s.get_path('purelib') + '/nvidia/*/include/curand_kernel.h'))"
CXX_SOURCES := $(wildcard $(CSRC)/*.cpp $(CSRC)/*.h $(CSRC)/*.cu)
CXX_TESTS := $(wildcard tests/emulation/*.cpp tests/emulation/*.h examples/cpp/*.cu)
BUILT := $(CSRC)/build/.built

.PHONY: demo test test-gpu mutants cuda-check build lint clean
demo: build
	$(PY) quick_demo.py

test: build
	$(PY) -m pytest -q

test-gpu: build
	$(PY) -m pytest -q -m gpu

mutants: build
	$(PY) -m tests.mutants

# Compiles the kernels for every architecture, without a card; a spill in a fast kernel fails.
cuda-check: $(SETUP)
	command -v nvcc >/dev/null || exit 0; $(HAS_CURAND) || $(PY) -m pip install -q nvidia-curand
	$(PY) $(CSRC)/compile_check.py

lint: $(SETUP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -c "import clang_format; clang_format.clang_format()" --dry-run --Werror $(CXX_SOURCES) $(CXX_TESTS)

build: $(BUILT)

$(BUILT): $(SETUP) $(CXX_SOURCES) $(CSRC)/setup.py
	cd $(CSRC) && $(PYTHON_PATH) setup.py build_ext --inplace
	touch $@

$(VENV)/.installed: requirements.txt constraints.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements.txt -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) $(CSRC)/build $(CSRC)/*.so .pytest_cache .ruff_cache
