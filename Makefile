# Two commands on a fresh machine with Python 3.11 or later, a C++ compiler and make:
#   make demo   the whole job on real data; look into demo_output/
#   make test   lint, types, and every test, with the compiled extension and without it

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f 2>/dev/null)
# One process a core, each with one thread: threads of several processes would only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

.PHONY: install demo wheels test lint tests tests-without-extension fuzz sanitize docs clean

install: .venv/.installed

.venv/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel pybind11 ninja numpy
	SCFM_REQUIRE_EXT=$(SCFM_REQUIRE_EXT) SCFM_WERROR=$(SCFM_WERROR) $(BIN)/pip install --quiet --disable-pip-version-check \
		-c constraints.txt --no-build-isolation -e ".[dev,pancreas]"
	@# Tests that want these skip where they are missing: an oracle, without its dependencies, which pin old versions; Harmony.
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps scgpt==0.2.4
	-$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "harmonypy>=2.0"
	touch $@

# A demo needs the package alone. pip shows its progress, because the first installation downloads torch.
.venv/.demo: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing torch and scfm into .venv (once; some minutes)"
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt torch setuptools wheel pybind11 ninja numpy
	SCFM_REQUIRE_EXT=$(SCFM_REQUIRE_EXT) $(BIN)/pip install --disable-pip-version-check \
		-c constraints.txt --no-build-isolation -e .
	touch $@

demo: $(if $(wildcard .venv/.installed),install,.venv/.demo)
	$(BIN)/python tutorials/demo.py demo_output

# dist/: the sdist, and a wheel for this Python, installed into a fresh environment and tried there.
wheels: install
	.ci/wheels
	.ci/try_wheel dist/*.whl

test: lint tests tests-without-extension

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tests: install
	$(PYTEST)

# What needs the extension skips itself; the rest must hold in pure torch and NumPy.
tests-without-extension: install
	SCFM_DISABLE_EXT=1 $(PYTEST) -m "not slow"

# 10,000 AnnData in many forms, 1,000 damaged models and 20 kills of each program; a short part is among the tests.
fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py --n 10000
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/models.py --n 1000
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/kills.py --n 20

# The kernels built again with the address and undefined-behavior sanitizers.
sanitize: install
	SCFM_TEST_SANITIZERS=1 $(BIN)/python -m pytest -q tests/ops/test_sanitizers.py

docs: install
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]" --no-build-isolation
	$(BIN)/python -m sphinx -W docs docs/_build/html
	$(BIN)/python docs/check_pages.py docs/_build/html

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo_output
	find scfm -name '*.so' -delete
