# Every verb of the project. What is missing on the machine, scripts/setup.sh installs first.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup build test aarch64 demo format format-check lint asan tsan bench clean

VENV := .venv/bin
RELEASE := build/release
CPP_FILES = git ls-files -z --cached --others --exclude-standard '*.h' '*.cc' '*.cu'

help: ## This list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 22

setup: ## Install what is missing: Debian packages (as root), Python packages in .venv
	@scripts/setup.sh

# Ninja configures again by itself when a CMake file changes.
$(RELEASE)/build.ninja: CMakePresets.json | setup
	@cmake --preset release
	@touch $@

build: setup $(RELEASE)/build.ninja ## Build everything, optimised, in build/release
	@cmake --build --preset release

test: build ## Build and run every test: ctest, then pytest
	@scripts/test.sh

aarch64: setup ## Build and run the kernels' tests for AArch64, on emulated processors
	@scripts/aarch64.sh

# passive: where other programs have the cores, threads that spin take three times as long.
demo: setup $(RELEASE)/build.ninja ## Train, quantize and save a small network on Fashion-MNIST
	@cmake --build --preset release --target quantal-demo
	@OMP_WAIT_POLICY=passive $(RELEASE)/examples/cpp/quantal-demo

format: setup ## Format the C++ and Python files
	@$(CPP_FILES) | xargs -0 $(VENV)/clang-format -i
	@$(VENV)/ruff format --quiet
	@$(VENV)/ruff check --quiet --select I --fix

format-check: setup ## Fail where `make format` would change a file
	@$(CPP_FILES) | xargs -0 $(VENV)/clang-format --dry-run --Werror
	@$(VENV)/ruff format --check --quiet --diff

lint: setup ## clang-tidy and ruff
	@scripts/lint.sh

asan: setup ## Build and run the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@scripts/sanitize.sh asan

tsan: setup ## The same under ThreadSanitizer, for the parts without libtorch
	@scripts/sanitize.sh tsan

# BENCH: arguments of benchmarks/linear.py, as in `make bench BENCH=--quick`.
bench: build ## Run the benchmarks, beside other libraries; results go to build/bench-results
	@scripts/bench-setup.sh
	@scripts/bench.sh $(BENCH)

clean: ## Remove the build folders; .venv stays
	@rm -rf build
