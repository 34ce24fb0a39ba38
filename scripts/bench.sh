#!/usr/bin/env bash
# Runs every benchmark of the release build; a JSON file each goes to build/bench-results.
set -euo pipefail
cd "$(dirname "$0")/.."

mkdir -p build/bench-results
for program in build/release/benchmarks/*_bench; do
  "$program" --benchmark_out="build/bench-results/$(basename "$program" _bench).json" \
    --benchmark_out_format=json
done
