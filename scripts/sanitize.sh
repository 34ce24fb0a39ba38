#!/usr/bin/env bash
# sanitize.sh asan|tsan: builds the tests under that preset's sanitizers and runs them.
set -euo pipefail
cd "$(dirname "$0")/.."

preset=$1
export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1
export LSAN_OPTIONS=suppressions=$PWD/scripts/lsan.supp:print_suppressions=0
export UBSAN_OPTIONS=print_stacktrace=1
cmake --preset "$preset"
cmake --build --preset "$preset"
ctest --preset "$preset"
