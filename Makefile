# make install | demo | test | test-ray | docs | bench | clean. Uses uv where it is there, plain pip otherwise.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := train,gpu,dev
# CUDA 13, as the libraries of the extra gpu; a resolver may take an older torch that is built on CUDA 12.
TORCH := "torch>=2.15"
# make install CPU=1: torch without CUDA. With pip, see docs/how-to/install.md.
ifdef CPU
EXTRAS := train,cpu,dev
TORCH :=
UV_TORCH := --torch-backend=cpu
endif
# The stamp names the extras, so that other ones are installed; `.installed` alone is of an older Makefile.
COMMA := ,
STAMP := $(VENV)/.installed-$(subst $(COMMA),-,$(EXTRAS))
OTHERS = $(filter-out $(STAMP),$(wildcard $(VENV)/.installed-*))
UV := $(shell command -v uv 2>/dev/null)
ifdef NO_UV
UV :=
endif
DEMO := demo
# make demo DEMO_SIZE=short: fewer phantoms and epochs, for a machine that only checks that it runs.
DEMO_SIZE := full
STUDIES_full := 800
STUDIES_short := 60
EPOCHS_full := 8,16,24
EPOCHS_short := 1,2
REPEATS_full := 100
REPEATS_short := 10
CXR := $(BIN)/cxrfast

.PHONY: install demo test test-ray lint docs bench clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1)
# Of other extras: made anew, for pip would keep the torch that is there, and both builds of ONNX Runtime.
	$(if $(OTHERS),rm -rf $(VENV))
ifneq ($(UV),)
	uv venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	uv pip install --quiet --python $(BIN)/python $(UV_TORCH) $(TORCH) -e '.[$(EXTRAS)]'
else
	@echo "installing $(EXTRAS) with pip: some minutes and up to 6.3 GB on disk, in silence; with uv installed it is faster"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) $(TORCH) -e '.[$(EXTRAS)]'
endif
	@touch $@
	@echo "installed; now tell this shell where cxrfast is:  . $(BIN)/activate"

demo: install
	rm -rf $(DEMO)
	$(CXR) phantom $(DEMO)/data --studies $(STUDIES_$(DEMO_SIZE)) --size 192
	$(CXR) cache $(DEMO)/data --weights random:0:test_vit --out $(DEMO)/phantom.h5
	$(CXR) sweep $(DEMO)/phantom.h5 --epochs $(EPOCHS_$(DEMO_SIZE)) --lr 1e-3 --weight-decay 1e-2 --batch-size 32 --dropout 0.3 --precision float32 --out $(DEMO)/run
	$(CXR) export $(DEMO)/run --variants fp32
	$(CXR) predict $(DEMO)/run/model.fp32.onnx $(DEMO)/data/images --out $(DEMO)/predictions.csv
	$(CXR) bench latency $(DEMO)/run/model.fp32.onnx --images $(DEMO)/data/images --repeats $(REPEATS_$(DEMO_SIZE))
	@echo
	@echo "report: $(DEMO)/run/report.html"
	@echo "next, on real data:  $(CXR) prepare DATASET;  $(CXR) cache DATASET;  $(CXR) sweep --recipe tuned"

# Two processes of one thread: on two cores two thirds of the time that one process takes. Compiled modules are kept, whatever
# the machine says: without them each process of a test compiles the package again.
test: install lint
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not ray"

# Real Ray clusters, nodes and workers killed; by themselves, since beside the others they take twice as long.
test-ray: install
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	[ ! -x $(BIN)/hadolint ] || $(BIN)/hadolint docker/*.Dockerfile

# The CPU figures of docs/explanation/benchmarks.md, under 15 minutes on 2 cores; each driver says which file of benchmarks/results/ it wrote.
BENCH := PYTHONPATH=. $(BIN)/python benchmarks
bench: install
	$(BENCH)/run_cache.py --count 24 --rounds 3
	$(BENCH)/run_training.py --part steps --rounds 3
	$(BENCH)/run_inference.py --rounds 6
	$(BENCH)/run_cold_start.py --rounds 5
	$(BENCH)/run_bootstrap.py --rounds 3
	$(BENCH)/readme_table.py

# The pages as a site in site/; a warning is an error. Only the installation needs the network.
PIP := $(if $(UV),uv pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet $(PIP_ARGS))
docs: install
	@$(BIN)/python -c 'import material, mkdocs_click, mkdocstrings' 2>/dev/null || $(PIP) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "wrote site/index.html"

# What a release uploads, in dist/, and what is in it.
.PHONY: dist
dist: install
	rm -rf dist build/tree
	$(BIN)/python -m build
	$(BIN)/python -m build --wheel --outdir build/tree
	$(BIN)/twine check --strict dist/*
	$(BIN)/python .ci/check_dist.py dist build/tree

clean:
	rm -rf $(VENV) $(DEMO) site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
