# PYTHON names an environment that already has torch (a GPU machine's own); without it, .venv is made here.
ifdef PYTHON
PY := $(PYTHON)
READY :=
else
PY := .venv/bin/python
READY := .venv/.ready
endif
WORKERS ?= 2
# expanded when a recipe runs, after setup; a machine's own environment may lack xdist
XDIST = $(shell $(PY) -c "import xdist" 2>/dev/null && echo "-n $(WORKERS) --dist worksteal")
# without a GPU the pinned CPU build and no compiled kernels, with one the newest of everything
ifeq ($(shell command -v nvidia-smi),)
PINS := -c constraints/cpu.txt
BUILD := none
else
PINS :=
BUILD := auto
endif

.PHONY: setup demo test test-all lint bench memory aot gpu build-gpu clean

setup: $(READY)

# torch first and pinned: a range would resolve to gigabytes of CUDA packages on a machine without a GPU
.venv/.ready: constraints/cpu.txt pyproject.toml
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install -q $(PINS) torch
	.venv/bin/python -m pip install -q $(PINS) "setuptools>=77" wheel
# headers alone: what the package depends on is for its Python; without them csrc/two_source is left out
	.venv/bin/python -m pip install -q $(PINS) --no-deps nvidia-cutlass || echo "nvidia-cutlass was not installed"
	VLKERNELS_BUILD=$(BUILD) .venv/bin/python -m pip install -q $(PINS) --no-build-isolation -e ".[hf,qlora,demo,bench,dev]"
	touch $@

demo: setup
	$(PY) -m models demo

# the ops first: a broken kernel shows before anything that stands on it
test: setup
	@if $(PY) -m ruff --version >/dev/null 2>&1; then $(PY) -m ruff check .; else echo "ruff is not installed: not linted"; fi
	$(PY) -m pytest tests -q -m "not slow" $(XDIST)

test-all: setup
	$(PY) -m pytest tests -q $(XDIST)
	$(MAKE) test-transformers-5.17

# the older transformers in an environment of its own, on top of the first one's torch
.PHONY: test-transformers-5.17
test-transformers-5.17: setup
	test -x build/venv-5.17/bin/python || $(PY) -m venv build/venv-5.17
	$(PY) -c "import site; print(site.getsitepackages()[0])" > build/venv-5.17/first
	cp build/venv-5.17/first "$$(build/venv-5.17/bin/python -c 'import site; print(site.getsitepackages()[0])')/first.pth"
	build/venv-5.17/bin/python -m pip install -q transformers==5.17.0 huggingface_hub==1.33.0
	build/venv-5.17/bin/python -c "import transformers; assert transformers.__version__ == '5.17.0', transformers.__version__"
	build/venv-5.17/bin/python -m pytest tests/test_integrations.py tests/test_peft_behaviours.py tests/test_swap_*.py tests/test_insert*.py tests/test_ladder.py -q -m "not slow" -p no:cacheprovider $(XDIST)

# time every op here; without a GPU a tiny smoke run into build/bench/
bench: setup
	$(PY) -m benchmarks

# count bytes, FLOPs and launches again, and the tables made from them
memory: setup
	$(PY) -m benchmarks.memory --json benchmarks/results/memory.json
	$(PY) -m benchmarks.report --readme README.md

# compile every Triton kernel for three architectures, and the table made from that
aot: setup
	$(PY) -m vlkernels.testing.aot --arch 80,90,100 --json benchmarks/results/aot.json
	$(PY) -m benchmarks.report --readme README.md

# everything that needs a GPU, within ten minutes; needs no network
gpu: setup
	$(PY) -m benchmarks.gpu

# what `make gpu` takes along to a machine without nvcc
build-gpu: setup
	$(PY) setup.py build_ops --dest build/gpu

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
