# make demo and make test do their own set-up; neither needs the other.
PYTHON  ?= python3
TORCH   ?= torch==2.13.0
TORCHES ?= 2.11.0 2.14.1
VENV    ?= .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
DOCS    ?= .venv-docs
DOCS_READY := $(DOCS)/.ready
NOTEBOOK ?= .venv-notebook
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The tests are many and small: a process a core, with one thread each, is the quickest. A process takes up to a gigabyte.
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: help setup demo test test-all frameworks notebook bench compat docs sanitize cuda-check lint clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## make .venv and install the package with everything in it

$(READY): pyproject.toml $(wildcard setup.py) $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu*' -o -name toolkit.py)
	@echo "1 of 3: a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "2 of 3: $(TORCH), a download of some 200 MB"
	@$(PIP) "$(TORCH)" numpy "setuptools>=77" wheel "pybind11>=2.13" ninja
	@echo "3 of 3: l2l_fast itself; compiling its kernels takes a minute or two"
	@$(PIP) --no-build-isolation --editable ".[test]"
	@touch $@

demo: $(READY)  ## learn an optimizer, beat tuned Adam with it, train a network: a few minutes
	$(BIN)/l2l-fast demo

test: lint  ## the test suite, with coverage: minutes
	$(PYTEST) -m "not slow" --cov --cov-report=term --cov-fail-under=90

test-all: test  ## and what takes long: sanitizers, every GPU architecture, a hundred kills, the soak
	$(PYTEST) -m slow

frameworks: $(VENV)/.frameworks  ## the optimizer in Hugging Face's Trainer, Accelerate and Lightning: installs them, minutes
	$(PYTEST) tests/frameworks \
	    tests/test_docs.py::test_the_example_of_hugging_faces_trainer_runs_and_resumes \
	    tests/test_docs.py::test_the_example_of_lightning_runs

$(VENV)/.frameworks: $(READY)
	@$(PIP) "l2l_fast[frameworks]"
	@$(BIN)/python -c "import accelerate, lightning, transformers"
	@touch $@

notebook: $(NOTEBOOK)/.ready  ## meta-training in a real Jupyter kernel: installs one beside .venv, a minute
	$(NOTEBOOK)/bin/python -m pytest tests/notebook

# A venv of its own on top of .venv, so that what Jupyter needs does not get into what everything else is tested with.
$(NOTEBOOK)/.ready: $(READY)
	@$(BIN)/python -m venv $(NOTEBOOK)
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	    > $$($(NOTEBOOK)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/main.pth
	@$(NOTEBOOK)/bin/python -m pip install --quiet --disable-pip-version-check "nbclient>=0.10" "ipykernel>=6.29"
	@touch $@

docs: $(DOCS_READY)  ## build the documentation into site/, strictly: a link that leads nowhere is an error
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "The documentation is in site/index.html"

# A venv of its own: the pages are read from the sources, so neither torch nor kernels are needed.
$(DOCS_READY): pyproject.toml
	@$(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check $$($(PYTHON) -c "import tomllib; \
	    print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	@touch $@

bench: $(READY)  ## time every step and meta-gradient beside its rivals: under ten minutes, on a quiet machine
	@mkdir -p runs
	$(BIN)/python -m pytest bench -rs --benchmark-quiet --benchmark-json=runs/benchmark.json
	$(BIN)/python bench/report.py runs/benchmark.json

compat: $(READY)  ## sdist and wheel, then that one wheel on each of TORCHES: gigabytes to download, minutes for each
	tests/compat.sh $(BIN)/python "$(TORCHES)"

sanitize:  ## the kernels without torch under AddressSanitizer and UndefinedBehaviorSanitizer
	csrc/sanitize.sh

cuda-check: $(READY)  ## compile the CUDA kernels for every architecture, no GPU needed; their registers and memory
	$(BIN)/python csrc/cuda/check.py

lint: $(READY)  ## style and types alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove what setup and builds made
	rm -rf $(VENV) $(DOCS) $(NOTEBOOK) site build dist *.egg-info l2l_fast/*.so runs/benchmark.json
