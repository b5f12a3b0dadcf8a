# `make` alone lists what there is. Everything but `help` and `clean` sets itself up first, which
# takes no time when all is there.

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# What tests tell is to be seen when they tell it, also where it goes into a file.
export PYTHONUNBUFFERED := 1
# Compiled modules are kept, whatever the environment says: tests start hundreds of programs, and
# half of what a short one costs would be to compile this package.
unexport PYTHONDONTWRITEBYTECODE

# The release whose image the demo and most of the guests' tests start: bookworm or trixie are built
# here, an Ubuntu series such as noble is downloaded.
RELEASE ?= bookworm
export PYCLOUDLIB_TEST_RELEASE := $(RELEASE)
# Handed to pytest by unit, qemu and guest, e.g. PYTEST_ARGS='-k download -x'.
PYTEST_ARGS ?=
# Handed to the benchmark, e.g. BENCH_ARGS='--rounds 5 --skip many'.
BENCH_ARGS ?=
# Handed to the benchmark of a suite of tests, e.g. SUITE_ARGS='--tests 10 --workers 1'.
SUITE_ARGS ?= --rounds 1

PYTHON_IN_VENV := .venv/bin/python
PYTEST := $(PYTHON_IN_VENV) -m pytest
# A worker for each processor, up to four: each test that boots no guest has all that it changes to
# itself, but the ports that machines lease on this host are a hundred. Who is done takes tests of
# another one.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist worksteal
CODE := src tests examples scripts benchmarks docs
WORKFLOWS := .github/workflows/ci.yml

.PHONY: help setup demo test checks lint format docs unit qemu guest boots copies thorough kvm wheel measure bench clean

help:  ## List the targets
	@echo "make TARGET, where TARGET is one of:"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-10s %s\n", $$1, $$2 }'

setup:  ## Install what is missing: QEMU and other host programs, a virtual environment in .venv
	@scripts/setup.sh

demo: setup  ## Launch a machine, run a few commands in it, delete it (RELEASE=noble for Ubuntu's image)
	@$(PYTHON_IN_VENV) examples/demo.py --release $(RELEASE)

# Side by side, as none keeps two processors busy all the time.
test: setup  ## Everything that has to pass: lint, docs, unit, wheel, qemu, guest
	@$(MAKE) -j3 --output-sync=line boots copies checks

checks: setup  ## Everything that boots no guest: lint, docs, wheel, unit and qemu side by side
	@$(MAKE) -j1 lint docs wheel
	$(PYTEST) $(SIDE_BY_SIDE) tests/unit tests/qemu $(PYTEST_ARGS)

lint: setup  ## Check style and types, and the workflow of CI: ruff, mypy, check-jsonschema
	$(PYTHON_IN_VENV) -m ruff check $(CODE)
	$(PYTHON_IN_VENV) -m ruff format --check $(CODE)
	$(PYTHON_IN_VENV) -m mypy $(CODE)
	$(PYTHON_IN_VENV) -m check_jsonschema --builtin-schema vendor.github-workflows $(WORKFLOWS)

format: setup  ## Format the code, and mend what ruff can mend
	$(PYTHON_IN_VENV) -m ruff format $(CODE)
	$(PYTHON_IN_VENV) -m ruff check --fix $(CODE)

docs: setup  ## Build the documentation into build/docs, and check the code in it
	$(PYTHON_IN_VENV) -m scripts.doc_blocks
	$(PYTHON_IN_VENV) -m sphinx -q -W --keep-going -b html docs build/docs

unit: setup  ## Run the tests without QEMU and network (a few minutes)
	$(PYTEST) $(SIDE_BY_SIDE) tests/unit $(PYTEST_ARGS)

qemu: setup  ## Run the tests with the real QEMU, without a guest (some minutes)
	$(PYTEST) $(SIDE_BY_SIDE) tests/qemu $(PYTEST_ARGS)

guest: setup  ## Run the tests that boot real guests (half an hour in emulation)
	$(PYTEST) tests/guest $(PYTEST_ARGS)

boots: setup  ## Those of them that are about machines that boot
	$(PYTEST) tests/guest -m 'uses and not thorough' $(PYTEST_ARGS)

copies: setup  ## The others, most of which start from one saved machine
	$(PYTEST) tests/guest -m 'not uses and not thorough' $(PYTEST_ARGS)

thorough: setup  ## Run the tests that are too many for every time (half an hour in emulation)
	$(PYTEST) tests -m thorough $(PYTEST_ARGS)

# What CI runs, and what whoever has KVM can run in one go. Without it nothing begins.
kvm: setup  ## Run `test` with KVM, which has to work here (RELEASE=noble, then `make bench`)
	@printf '[qemu]\naccelerator = "kvm"\n' > build/kvm.toml
	PYCLOUDLIB_CONFIG=$(CURDIR)/build/kvm.toml .venv/bin/pycloudlib doctor
	PYCLOUDLIB_CONFIG=$(CURDIR)/build/kvm.toml .ci/run

wheel: setup  ## Build the package into dist/, install it elsewhere, and check what was installed
	@rm -rf dist
	@echo "Building dist/"
	@$(PYTHON_IN_VENV) -m build > build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	@$(PYTHON_IN_VENV) -m scripts.check_wheel dist/*.whl

measure: wheel  ## Measure the package: size of an installation, time of an import
	@$(PYTHON_IN_VENV) -m benchmarks package dist/*.whl

# The original's seeds need genisoimage; nothing else here does.
bench: wheel  ## Measure the original and this package side by side, then a suite of tests (BENCH_ARGS='--rounds 1')
	@EXTRA_REQUIREMENT='genisoimage|genisoimage|writes the seeds of the original' scripts/setup.sh
	@$(PYTHON_IN_VENV) -m benchmarks compare dist/*.whl $(BENCH_ARGS)
	@$(PYTHON_IN_VENV) -m benchmarks suite $(SUITE_ARGS)

clean:  ## Remove what was made here: .venv, dist, caches (images and machines are elsewhere)
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests examples scripts benchmarks -name __pycache__ -prune -exec rm -rf {} +
