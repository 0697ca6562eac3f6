# Every target sets up what it needs in .venv by itself.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# A test that not even its timeout ends shows where it hangs, and ends the run.
HANG   := -o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true
# Byte code makes starting up twice as fast.
unexport PYTHONDONTWRITEBYTECODE
LINUX  := --kernel build/debian/vmlinuz --initrd build/debian/initrd.gz --append 'console=ttyS0 panic=-1'

VIRTIO := $(addprefix tests/integration/test_linux_,virtio.py net.py vsock.py balloon.py vhost.py share.py hvc.py)
CONTROL := tests/integration/test_gdb_linux.py::test_from_start_kernel_to_the_shell \
  $(addprefix tests/integration/test_linux_qmp.py::test_,it_stands_still_and_goes_on a_reset_boots_again \
  the_power_button_is_a_key_of_the_guest)

FULL := tests/integration/test_linux_share.py::test_a_folder_with_10_000_files \
  $(addprefix tests/integration/test_,debian_root.py linux_net.py linux_virtio.py linux_vhost.py)

SNAPSHOT := $(addprefix tests/integration/test_,snapshot_linux.py linux_shell.py)

.PHONY: help setup demo test test-lab lab-control lab-full lab-snapshot lab-virtio \
  test-long lint format bench bench-lab clean
.DEFAULT_GOAL := help

help:            ## list the targets
	@sed -n 's/^\([a-z-]*\): .*## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(VENV)/.ready  ## make .venv with vmexit and its tools

$(VENV)/.ready: pyproject.toml setup.py src/vmexit/core/_steps.pyx
	@echo "== setting up $(VENV) (Python packages from PyPI)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "vmexit needs Python 3.11 or newer; use make PYTHON=python3.12"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
	  || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); } \
	  || { rm -rf $(VENV); echo "cannot make $(VENV); on Debian: apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: setup      ## boot Debian's kernel to a shell (where there is no apt: a small guest)
	@echo "== vmexit fetch debian --output build/debian"
	@if $(BIN)/vmexit fetch debian --output build/debian; then \
	  echo "== vmexit run $(LINUX)"; \
	  if [ -t 0 ]; then $(BIN)/vmexit run $(LINUX) || [ $$? = 130 ]; exit; fi; \
	  echo 'uname -a; poweroff -f' | $(BIN)/vmexit run $(LINUX) --timeout 300; \
	else \
	  echo "== vmexit run guests/long-hello.bin --mode long --stats"; \
	  $(BIN)/vmexit run guests/long-hello.bin --mode long --stats --timeout 60; \
	fi

test: setup      ## the test suite
	@echo "== tests"
	@$(BIN)/python -m pytest -m "not soak" $(HANG) $(TESTS)

test-lab: setup  ## the tests on Linux's own KVM, in an emulated machine: docs/kvm-lab.md
	@$(BIN)/python -m pytest -q --collect-only tests/lab >/dev/null  # byte code, which the lab cannot keep
	@PYTHONPATH=tests:tests/integration $(BIN)/python tests/lab/test_boot_log.py build/soft-boot.log
	@tools/test-lab $(BIN)/python -m pytest tests/lab tests/guest/test_smp.py -m "not lab_tool and not soak" -k "not soft]"

lab-control: setup ## gdb and QMP clients at Linux, there: ten minutes
	@PYTHONPATH=tests $(BIN)/python tests/kernels.py >/dev/null  # which the lab cannot fetch
	@$(BIN)/python -m pytest -q --collect-only $(CONTROL) >/dev/null
	@tools/test-lab $(BIN)/python -m pytest --timeout 600 $(CONTROL)

lab-snapshot: setup ## Linux goes on from snapshots, there: a quarter of an hour
	@PYTHONPATH=tests $(BIN)/python tests/kernels.py >/dev/null  # which the lab cannot fetch
	@$(BIN)/python -m pytest -q --collect-only $(SNAPSHOT) >/dev/null
	@LAB_SECONDS=1800 tools/test-lab $(BIN)/python -m pytest --timeout 850 $(SNAPSHOT)

lab-virtio: setup ## the tests of virtio devices with Linux, there: half an hour
	@PYTHONPATH=tests $(BIN)/python tests/kernels.py >/dev/null  # which the lab cannot fetch
	@LAB_SECONDS=2400 tools/test-lab $(BIN)/python -m pytest -m "not soak" --timeout 900 $(VIRTIO)

lab-full: setup  ## the longest of them at their full size, there: two hours
	@PYTHONPATH=tests $(BIN)/python tests/kernels.py >/dev/null  # which the lab cannot fetch
	@PYTHONPATH=tests $(BIN)/python -c 'from debian_root import debian_root; debian_root()'
	@$(BIN)/python -m pytest -q --collect-only $(FULL) >/dev/null
	@VMEXIT_FULL=1 tools/kvm-lab --memory 6144 --timeout 18000 -- $(BIN)/python -m pytest -v -m soak $(FULL) </dev/null

test-long: setup ## the test suite with all repetitions
	@$(BIN)/python -m pytest $(TESTS)

lint: setup      ## style, types, layers
	@echo "== ruff, mypy, import-linter"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup    ## put the sources into shape
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup     ## measure against C and QEMU, side by side
	@$(BIN)/python benchmarks/run.py $(BENCH)

bench-lab: setup ## measure boots and virtio on Linux's own KVM against QEMU: docs/kvm-lab.md
	@$(BIN)/python benchmarks/lab.py --prepare  # the kernel and byte code, which the lab cannot keep
	@tools/kvm-lab --timeout 3600 -- $(BIN)/python benchmarks/lab.py $(BENCH)

clean:           ## remove what the targets made
	rm -rf $(VENV) .venv-* build src/vmexit/core/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis benchmarks/build
