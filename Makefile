# Every target sets itself up: `make demo` and `make test` work on a bare machine with Python 3.11+.
# ROW picks the versions of torch, triton, torchvision and numpy (.ci/rows): `make test ROW=oldest`.
# PYTHON picks the interpreter that makes the virtual environment; VENV its place.
ROW ?= newest
PYTHON ?= python3
VENV ?= $(if $(filter newest,$(ROW)),.venv,.venv-$(ROW))
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt .ci/rows/$(ROW).txt
# What `make demo` writes to.
OUT ?= runs/demo

.PHONY: demo test test-slow check fix test-compile test-compiled test-gpu bench gpu-report clean

# One pip command, pinned: torch, torchvision and numpy must be resolved together. Redone only when a file it reads changes.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=-c %) -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/tmask demo --out $(OUT)

# Two workers, one thread each: on more threads they would only wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test: $(VENV)/.installed
	TRITON_INTERPRET=1 $(PYTEST) -n 2 -m 'not slow and not gpu and not compile_only'

test-slow: $(VENV)/.installed
	TRITON_INTERPRET=1 $(PYTEST) -n 2 -m 'slow and not gpu'

test-compile: $(VENV)/.installed
	TRITON_INTERPRET=0 $(PYTEST) -n 2 tests/compile_only

# The kernels as Triton compiles them, executed on the CPU by ttsem, which wants Python 3.12: in a venv of its own.
COMPILED ?= .venv-compiled
COMPILED_CONSTRAINTS := constraints.txt .ci/rows/compiled.txt
$(COMPILED)/.compiled: pyproject.toml $(COMPILED_CONSTRAINTS) .ci/rows/newest.txt
	"$$(.ci/python 3.12)" -m venv $(COMPILED)
	$(COMPILED)/bin/python -m pip install --quiet --disable-pip-version-check $(COMPILED_CONSTRAINTS:%=-c %) -e '.[dev]' ttsem
	touch $@

# Left out: files that launch no kernel, and three groups that take minutes each here. ARGS="-k nms" picks some tests,
# ARGS="-m slow" those that `make test` leaves out too.
test-compiled: $(COMPILED)/.compiled
	OMP_NUM_THREADS=1 TRITON_INTERPRET=0 $(COMPILED)/bin/python -m pytest -p tests.compiled.plugin -n 2 -m 'not slow' $(ARGS) \
		$(foreach file,arguments machine kernel_rules,--ignore tests/kernels/test_$(file).py) \
		$(addprefix --deselect tests/kernels/test_,mask_targets.py::test_equals_torchvision \
			paste_masks.py::test_all_outputs modules.py::test_torchvision_model) \
		tests/compiled tests/kernels tests/test_validate.py::test_every_row_passes_on_a_gpu

# The tests of kernels and model take their device from a fixture, so here they run compiled.
test-gpu: $(VENV)/.installed
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/gpu tests/kernels tests/model tests/engine/test_resume.py \
		tests/test_validate.py -m 'not compile_only'

# The same as `tmask bench`; ARGS="op", "model", "roi_align nms", "-k nms-1k". `pytest bench/cases/nms.py` runs one bare.
bench: $(VENV)/.installed
	$(BIN)/python -m bench run $(ARGS)

# All that a GPU can prove, by the machine's own Python: nothing is installed, no network. ARGS="--only ops,tests" picks
# parts, ARGS="--sweep NAME" the launch configurations of one kernel; bench/__main__.py has the rest.
gpu-report:
	$(PYTHON) -m bench report $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-* runs build dist *.egg-info
