# `make help` lists what there is. PYTHON=python3.12 selects another Python for all of it.

PYTHON ?= python3
ARGS ?= file build/demo.img

VENV := .venv
BIN := $(VENV)/bin
# One environment at a time: the stamp's name says which Python it was made with, and another one makes it anew.
MADE := $(VENV)/made-with-$(subst /,-,$(PYTHON))

# The real clients that the interop tests drive, and what those tests need besides, as Debian calls them.
CLIENTS := nbdkit nbdkit-plugin-python libnbd-bin python3-libnbd qemu-utils nbd-client fio socat strace gnutls-bin systemd gcc libc6-dev

# What the proof of `make bench` is made with. nbd-server, another peer, is not here: its package starts a service.
BENCHMARKED := nbdkit nbdkit-plugin-python libnbd-bin fio gcc libc6-dev
BENCH ?= --suite proof

# What `make fuzz` fuzzes.
TARGETS ?= handshake transmission conversation session

# What makes and runs the virtual machine of `make test-vm`.
MACHINE := qemu-system-x86 mmdebstrap genext2fs e2fsprogs

# Coverage, lines and branches, in per cent: of everything, and of the files that are to have all of it.
COVERED := 95
COVERED_WHOLLY := nbdkitpy/protocol/*,nbdkitpy/backend.py,nbdkitpy/coroutines.py,nbdkitpy/stack.py,nbdkitpy/registry.py,nbdkitpy/located.py,nbdkitpy/modules.py

# $(call apt,PACKAGES) installs them where root may, and says what to type where not.
apt = { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	&& apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q $(1); } \
	|| { echo "Missing Debian packages. Please type: sudo apt-get install" $(1) >&2; false; }

.PHONY: help run test test-vm lint docs bench fuzz soak clean clients
.DEFAULT_GOAL := help

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /make \1	/p' Makefile | expand -t 16

run: $(VENV)/runs build/demo.img  ## Serve a demo disk, or what ARGS says: make run ARGS="file /path/disk.img"
	@echo 'To try it, in another terminal: nbdinfo URI, or qemu-img info URI, with the URI below. Ctrl-C ends it.'
	@$(BIN)/nbdkitpy -f --print-uri $(ARGS)

test: $(VENV)/tests clients  ## Run the tests with the real clients, and hold the coverage
	@$(BIN)/coverage erase
	@COVERAGE_FILE='$(CURDIR)/.coverage' COVERAGE_PROCESS_START='$(CURDIR)/pyproject.toml' $(BIN)/coverage run -m pytest
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report --fail-under=$(COVERED)
	@$(BIN)/coverage report --include='$(COVERED_WHOLLY)' --fail-under=100

lint: $(VENV)/tests  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs  ## Make the site and the manual pages, in build/html and build/man
	$(BIN)/sphinx-build -q -E -W --keep-going -c docs -d build/doctrees -b html . build/html
	$(BIN)/sphinx-build -q -W --keep-going -c docs -d build/doctrees -b man . build/man

bench: $(VENV)/runs  ## Compare with nbdkit, side by side, or what BENCH says: make bench BENCH="--peer qemu-nbd"
	@dpkg -s $(BENCHMARKED) >/dev/null 2>&1 || $(call apt,$(BENCHMARKED))
	$(BIN)/python benchmarks/compare.py $(BENCH)

fuzz: $(VENV)/fuzz  ## Fuzz the core for MINUTES (5) each of the targets in fuzz/, or of what TARGETS says
	@for target in $(TARGETS); do $(BIN)/python -m fuzz.run $$target $(or $(MINUTES),5) || exit; done

test-vm: $(VENV)/runs  ## Run those of vsock, kernel, systemd and a power cut in a virtual machine; K=WORD selects some
	@dpkg -s $(MACHINE) >/dev/null 2>&1 || $(call apt,--no-install-recommends $(MACHINE))
	@$(BIN)/python tests/vm/run.py $(if $(K),'$(K)')

soak: $(VENV)/tests  ## Let random clients loose on servers for MINUTES (10), and look for what is lost or leaks
	@$(BIN)/python -m tests.soak.soak --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

clean:  ## Remove what make has made
	rm -rf $(VENV) build dist htmlcov .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

clients:
	@dpkg -s $(CLIENTS) >/dev/null 2>&1 || $(call apt,$(CLIENTS)) \
	|| { [ -z "$$CI" ] && echo 'Tests that need one of these are skipped.'; }

$(MADE):
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
	|| $(call apt,$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'))
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/runs: $(MADE) pyproject.toml
	$(BIN)/pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/tests: $(MADE) pyproject.toml
	$(BIN)/pip install -q --disable-pip-version-check -e '.[test,lint]'
	@touch $@

$(VENV)/fuzz: $(MADE) pyproject.toml
	$(BIN)/pip install -q --disable-pip-version-check -e '.[fuzz]'
	@touch $@

$(VENV)/docs: $(MADE) pyproject.toml
	$(BIN)/pip install -q --disable-pip-version-check -e '.[docs]'
	@touch $@

build/demo.img:
	@mkdir -p build
	@echo 'This is the demo disk of nbdkitpy: 64 MiB, all zeroes after this line.' >$@.new
	@truncate -s 64M $@.new && mv $@.new $@
