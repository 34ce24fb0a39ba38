#!/usr/bin/env bash
# clang-tidy over the C++ files and ruff over the Python files; any finding fails. clang-tidy cannot
# read GCC's precompiled headers, so it gets compile commands without them.
set -uo pipefail
cd "$(dirname "$0")/.."

cmake --preset release -B build/lint -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON -DCCACHE_PROGRAM= \
  >/dev/null || exit
status=0
.venv/bin/run-clang-tidy.py -clang-tidy-binary .venv/bin/clang-tidy -p build/lint -quiet \
  -j "$(nproc)" || status=1
.venv/bin/ruff check || status=1
exit $status
