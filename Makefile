# make demo: the environment, then the main job on the trained example. make test: lint, types and the whole test suite. make soak: its long forms.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FASHION := examples/fashion

.PHONY: demo test lint types suite soak lowest docs clean

demo: $(VENV)/.installed
	$(BIN)/convrewrite optimize $(FASHION)/fashion.pt --factory $(FASHION)/model.py:fashion_resnet \
		--rule separable --calib $(FASHION)/calibration.npz -o demo-out
	$(BIN)/python $(FASHION)/evaluate.py $(FASHION)/fashion.pt demo-out/model.onnx

test: lint types suite

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.tested
	$(BIN)/mypy

# A file at a time, slow ones first: tests/conftest.py says in which order, not the number of tests in a file. Bytecode is kept, even
# where the environment says otherwise: tests start a hundred processes, and each would compile the package anew.
suite: $(VENV)/.tested
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The long forms of tests: faults and interrupts at hundreds of moments, without a time limit.
soak: $(VENV)/.tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak

# The lowest versions that pyproject.toml allows, in an environment of their own: the tests that need no network from a zoo.
lowest:
	$(PYTHON) -m venv build/lowest
	build/lowest/bin/python -m pip install --quiet -c constraints-lowest.txt ".[recover,cluster]" pytest hypothesis markdown-it-py
	OMP_NUM_THREADS=1 build/lowest/bin/python -m pytest -W default tests/reporting tests/fitting tests/planning tests/stored tests/loading \
		tests/pipeline/test_sweeping.py tests/pipeline/test_clusters.py tests/whole/test_earlier_files.py

# The site, in build/site.
docs: $(VENV)/.tested
	$(BIN)/mkdocs build --strict

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

# pytorchcv and MONAI are networks for the tests: without what they depend on, since that brings torchvision.
$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]" requests
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps pytorchcv monai
	touch $@

clean:
	rm -rf $(VENV) demo-out build dist .mypy_cache .ruff_cache .hypothesis
