#!/usr/bin/env bash
# Runs every benchmark of the release build: its own programs, convolutions beside torch's, then the
# linear layer beside other libraries. JSON, tables and plots go to build/bench-results. --quick only
# sees that all of it runs.
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
build/release/benchmarks/call_memory ${QUANTAL_BENCH_QUICK:+--quick}
# What convolutions take of the arguments.
shared=()
previous=
for argument in "$@"; do
  if [[ $argument == --quick || $argument == --isa=* ]]; then
    shared+=("$argument")
  elif [[ $previous == --isa ]]; then
    shared+=(--isa "$argument")
  fi
  previous=$argument
done
.venv-bench/bin/python benchmarks/conv.py "${shared[@]}"
quick=()
[ -z "${QUANTAL_BENCH_QUICK:-}" ] || quick=(--quick)
.venv-bench/bin/python benchmarks/python_call.py "${quick[@]}"
exec .venv-bench/bin/python benchmarks/linear.py "$@"
