#!/usr/bin/env bash
# Runs every benchmark of the release build: its own programs, then the linear layer beside other
# libraries. JSON, tables and plots go to build/bench-results. --quick only sees that all of it runs.
# usage: scripts/bench.sh [arguments of benchmarks/linear.py]
set -euo pipefail
cd "$(dirname "$0")/.."

mkdir -p build/bench-results
times=()
if [[ " $* " == *" --quick "* ]]; then
  export QUANTAL_BENCH_QUICK=1
  times=(--benchmark_min_time=0.01)
fi
for program in build/release/benchmarks/*_bench; do
  "$program" --benchmark_out="build/bench-results/$(basename "$program" _bench).json" \
    --benchmark_out_format=json "${times[@]}"
done
exec .venv-bench/bin/python benchmarks/linear.py "$@"
