# Needs python3 (3.10 or later) and make; everything else is installed into .venv, once, and again when pyproject.toml changes.
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

# torch is installed first, by itself and pinned: left to the dependency list, pip takes the newest build of PyPI, which on Linux
# brings gigabytes of CUDA packages, and asks for them again with every release. For a CPU build (a tenth of the size), point
# TORCH_INDEX at PyTorch's index of those: make demo TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu".
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# tests/ops/triton looks at the machine code of this one. torch for CUDA asks for its own, and keeps it.
TRITON ?= triton==3.6.*

BIN := .venv/bin
READY := .venv/ready
# One thread a process: the tests are small, and two processes of one thread each beat one of two.
SINGLE := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test check style bench kernels sanitize emulate check-arm

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1@\2/p' Makefile | while IFS=@ read -r name text; do printf '%-14s %s\n' "$$name" "$$text"; done

demo: kernels  ## train a 4-bit network on handwritten digits (some minutes with compiling), results in runs/demo
	@$(BIN)/bitorch-engine train --data digits --w-bit 4 --out runs/demo --overwrite

test: kernels  ## run the tests; ARGS="-k packing" narrows them, WORKERS=8 uses more cores
	@$(SINGLE) $(BIN)/python -m pytest -q -n $(WORKERS) $(ARGS)

kernels: $(READY)  ## compile csrc/ into the source tree, what has changed of it
	@test -e build/kernels/build.ninja || echo "Compiling the kernels (a minute or two)"
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh -c 'cmake -S . -B build/kernels -G Ninja >build/kernels.log 2>&1 && cmake --build build/kernels >>build/kernels.log 2>&1' \
		|| { if grep -q "CMAKE_CXX_COMPILER" build/kernels.log; then echo "No C++ compiler: everything runs in plain PyTorch."; else cat build/kernels.log; exit 1; fi; }

sanitize: $(READY)  ## run the tests of the kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh -c 'cmake -S . -B build/sanitize -G Ninja -DSANITIZE=ON -DFOLDER=build/sanitize && cmake --build build/sanitize' >build/sanitize.log || { cat build/sanitize.log; exit 1; }
	@$(SINGLE) BITORCH_ENGINE_LIBRARY=$(CURDIR)/build/sanitize/libbitorch_engine_cpu.so ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		$(BIN)/python -m pytest -q -p no:cacheprovider -n $(WORKERS) tests/ops/cpu $(ARGS)

emulate: $(READY)  ## run the tests of the AVX-512 and AMX kernels on a processor with AVX2; needs SIMDe (libsimde-dev)
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh -c 'cmake -S . -B build/emulate -G Ninja -DEMULATE=ON -DFOLDER=build/emulate && cmake --build build/emulate' >build/emulate.log 2>&1 || { cat build/emulate.log; exit 1; }
	@$(SINGLE) BITORCH_ENGINE_LIBRARY=$(CURDIR)/build/emulate/libbitorch_engine_cpu.so \
		$(BIN)/python -m pytest -q -p no:cacheprovider -n $(WORKERS) tests/ops/cpu $(ARGS)

check-arm:  ## run csrc/tests compiled for aarch64 under qemu; needs g++-aarch64-linux-gnu and qemu-user
	@cmake -S . -B build/arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DFOLDER=build/arm >/dev/null
	@cmake --build build/arm --target smoke agreement >/dev/null
	@qemu-aarch64 -L /usr/aarch64-linux-gnu build/arm/smoke
	@qemu-aarch64 -L /usr/aarch64-linux-gnu build/arm/agreement

check: $(READY)  ## lint, formatting and types, changing nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

style: $(READY)  ## format, and fix what the linter can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: kernels  ## run the benchmarks; ARGS goes to them
	@$(BIN)/python -m benchmarks $(ARGS)

$(READY): export PIP_DISABLE_PIP_VERSION_CHECK := 1
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 10) else f"python3 is {v}, 3.10 or later is needed: make PYTHON=python3.12")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Creating .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; }
	@echo "Installing $(TORCH) (a large download the first time)"
	@$(BIN)/python -m pip install -qq 'pip>=23.1' # older ones, as Ubuntu 22.04's, do not hand on --config-settings
	@$(BIN)/python -m pip install -qq --no-deps $(TORCH) $(TORCH_INDEX)
	@echo "Installing bitorch_engine and its tools"
	@$(BIN)/python -c 'from importlib.metadata import requires; exit(any(r.startswith("triton") for r in requires("torch")))' \
		&& test "$$(uname -s)" = Linux && $(BIN)/python -m pip install -qq '$(TRITON)' || true
	@$(BIN)/python -m pip install -qq --config-settings=wheel.cmake=false -e '.[dev]'
	@# The source tree is found by its path alone. The import hook that comes with it would hide a tree named by PYTHONPATH.
	@sed -i.hook '/^import _editable_skbc/d' .venv/lib/python3*/site-packages/_editable_skbc_*.pth
	@mkdir -p build
	@touch $@
