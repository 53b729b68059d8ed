# make test: a virtual environment with the tested packages, then the tests on the CPU.
# PY=python3 (any interpreter) uses the environment you already have instead of making one.
VENV ?= .venv
ifeq ($(origin PY), undefined)
PY := $(VENV)/bin/python
SETUP := $(VENV)/.installed
endif

.PHONY: test lint clean
test: $(SETUP)
	$(PY) -m pytest -q

lint: $(SETUP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

$(VENV)/.installed: requirements.txt constraints.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements.txt -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
