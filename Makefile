# The two commands: `make demo` and `make test`. Each sets up what it needs first; `make help` lists the rest.
.DEFAULT_GOAL := help
.PHONY: help setup bpf demo test chaos soak test-vm test-arm lint docs evaluation validation clean install-units install-units-host install-units-dpu uninstall-units
MAKEFLAGS += --no-print-directory
unexport PYTHONPATH
export PYTHON
BIN := .venv/bin
LOG := build/lint.log
GUESTS = 6.17,7.2
GUEST_TESTS = tests/vm/guest tests/host/sched tests/memory/test_live.py -k 'vm or sched_ext'

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 16

setup: ## .venv with Wave and all it needs; PYTHON=... names the Python to make it with
	@.ci/setup

# BPF programs: each is one object beside its source, with all it needs to fit the kernel that loads it. The records' C header is made from Python.
CLANG = $(or $(shell command -v clang-19 || ls /usr/bin/clang-[0-9][0-9] 2>/dev/null | sort -V | tail -n 1),clang)
BPF_ARCH = $(subst aarch64,arm64,$(subst x86_64,x86,$(shell uname -m)))
BPF_FLAGS = -O2 -g -mcpu=v3 -target bpf -D__TARGET_ARCH_$(BPF_ARCH) -Wall -Wextra -Werror -Wno-unused-parameter -Wno-sign-compare -Wno-missing-field-initializers
BPF_INCLUDES = -Ibuild/bpf -Ihost/bpf -Ihost/sched -idirafter /usr/include/$(shell uname -m)-linux-gnu
BPF_SOURCES = $(shell find host tests -name '*.bpf.c' 2>/dev/null)

bpf: $(BPF_SOURCES:.c=.o) ## the BPF programs, with clang; a wheel brings them compiled
	@:

%.bpf.o: %.bpf.c build/bpf/wave_records.h $(shell find host tests -name '*.h' 2>/dev/null) Makefile
	@$(CLANG) $(BPF_FLAGS) $(BPF_INCLUDES) -c $< -o $@

build/bpf/wave_records.h: host/bpf/records.py wave/record.py wave/ring.py wave/outcome.py wave/sched/records.py
	@mkdir -p $(@D)
	@$(BIN)/python -P $< $@

demo: setup ## a real RocksDB measured here, and what moving its scheduling to an IPU costs and saves; DEMO_FLAGS=--help
	@$(BIN)/wave demo $(DEMO_FLAGS)

test: setup ## the tests; TEST_FLAGS="-m 'not slow'" for the quick ones
	@$(BIN)/pytest $(TEST_FLAGS)

test-vm: setup ## tests of sched_ext, DAMON and cgroup v2 in guests with other kernels (Debian's, some 350 MB the first time); TEST_FLAGS as above
	@$(BIN)/pytest $(GUEST_TESTS) --guests=$(GUESTS) $(TEST_FLAGS)

test-arm: setup ## tests of ring, links, contract and agents on emulated 64-bit Arm (root; some 350 MB the first time); TEST_FLAGS names others
	@tests/arm/run $(TEST_FLAGS)

chaos: setup ## kill the daemons of a live enclave 200 and 50 times, and look for what is lost; CHAOS_FLAGS="--quick" or --seed N
	@$(BIN)/python tests/chaos/storm.py $(CHAOS_FLAGS)

soak: setup ## half an hour of a live enclave under load, its agent replaced every minute: memory flat, nobody held up; SOAK_FLAGS="--minutes 3"
	@$(BIN)/python tests/chaos/soak.py $(SOAK_FLAGS)

lint: setup ## ruff, mypy --strict, import-linter
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary -p waveos >$(LOG) || { sed -E 's,^build/__editable__[^/]*/waveos/((agents|host|ipu_emulator|bench)/)?,\1,' $(LOG); exit 1; }
	@$(BIN)/lint-imports --no-cache >$(LOG) 2>&1 || { cat $(LOG); exit 1; }
	@echo "lint: clean"

docs: setup ## docs/policy-api.md from the docstrings
	@$(BIN)/python -P docs/generate.py

install-units install-units-host install-units-dpu: ## systemd's part of Wave, or the half of host or DPU; PREFIX, DESTDIR, WAVE=/path/to/wave (see docs/deploy.md)
	@DESTDIR=$(DESTDIR) PREFIX=$(PREFIX) WAVE=$(WAVE) systemd/install $(or $(patsubst install-units-%,%,$(filter install-units-%,$@)),all)

uninstall-units: ## take it away again
	@DESTDIR=$(DESTDIR) PREFIX=$(PREFIX) systemd/install remove

evaluation: setup ## the paper's figures beside this software's: docs/evaluation.md and out/evaluation.html (an hour or two; EVALUATE=--quick: some 10 minutes)
	@$(BIN)/wave bench paper $(EVALUATE) --markdown docs/evaluation.md --page out/evaluation.html

validation: setup ## the models against theory and this machine: docs/validation.md (some 40 minutes, root, a quiet machine)
	@$(BIN)/python -P docs/validate.py $(VALIDATE)

clean: ## everything that was made, .venv too
	@rm -rf .venv build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . \( -name __pycache__ -type d -prune -o -name '*.bpf.o' \) -exec rm -rf {} +
