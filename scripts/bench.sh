#!/usr/bin/env bash
# Runs every benchmark of the release build: its own programs, then the linear layer beside other
# libraries. JSON, tables and plots go to build/bench-results.
# usage: scripts/bench.sh [arguments of benchmarks/linear.py]
set -euo pipefail
cd "$(dirname "$0")/.."

mkdir -p build/bench-results
for program in build/release/benchmarks/*_bench; do
  "$program" --benchmark_out="build/bench-results/$(basename "$program" _bench).json" \
    --benchmark_out_format=json
done
exec .venv-bench/bin/python benchmarks/linear.py "$@"
