# Every target sets up what it needs. VENV=none uses the current environment, TORCH= another torch.
VENV ?= .venv
TORCH ?= torch==2.13.0
export PIP_DISABLE_PIP_VERSION_CHECK = 1

ifeq ($(VENV),none)
PYTHON := python3
else
PYTHON := $(VENV)/bin/python
endif
# Names what the build was made for, so that another VENV or TORCH builds anew.
READY := build/ready-$(subst /,_,$(VENV))-$(subst =,_,$(TORCH))
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: build test demo bench lint clean

build: $(READY)

$(READY): $(SOURCES)
ifneq ($(VENV),none)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q $(TORCH)
	$(PYTHON) -m pip install -q $(shell sed -n '/^dev = \[/,/^\]/s/^ *"\(.*\)",*$$/"\1"/p' pyproject.toml)
endif
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps -e .
	mkdir -p build && rm -f build/ready-* && touch $@

test: build
	$(PYTHON) -m pytest

demo: build
	$(PYTHON) examples/demo.py

bench: build
	$(PYTHON) -m pytest benchmarks

lint: build
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(dir $(PYTHON))clang-format --dry-run --Werror $(shell find csrc tests -name "*.cpp" -o -name "*.h" -o -name "*.inl")

clean:
	rm -rf build *.egg-info fusedloss/*.so
