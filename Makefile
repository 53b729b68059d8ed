# make test: a virtual environment with the tested packages, then the tests on the CPU.
# PY=python3 (any interpreter) uses the environment you already have instead of making one.
VENV ?= .venv
ifeq ($(origin PY), undefined)
PY := $(VENV)/bin/python
SETUP := $(VENV)/.installed
endif

# The interpreter's full path: the build runs in another folder.
PYTHON_PATH = $(if $(SETUP),$(abspath $(PY)),$(PY))
CSRC := src/cuda/csrc
BUILT := $(CSRC)/build/.built

.PHONY: test build lint clean
test: build
	$(PY) -m pytest -q

lint: $(SETUP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -c "import clang_format; clang_format.clang_format()" --dry-run --Werror $(wildcard $(CSRC)/*.cpp $(CSRC)/*.h)

build: $(BUILT)

$(BUILT): $(SETUP) $(wildcard $(CSRC)/*.cpp $(CSRC)/*.h) $(CSRC)/setup.py
	cd $(CSRC) && $(PYTHON_PATH) setup.py build_ext --inplace
	touch $@

$(VENV)/.installed: requirements.txt constraints.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements.txt -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) $(CSRC)/build $(CSRC)/*.so .pytest_cache .ruff_cache
