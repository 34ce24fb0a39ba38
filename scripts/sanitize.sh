#!/usr/bin/env bash
# sanitize.sh asan|tsan: builds the tests under that preset's sanitizers and runs each program whole,
# since an instrumented process is slow to start.
set -euo pipefail
cd "$(dirname "$0")/.."

preset=$1
export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1
cmake --preset "$preset"
cmake --build --preset "$preset"

failed=()
for program in build/"$preset"/tests/*/*_test; do
  printf '\n%s: %s\n' "$preset" "$program"
  "$program" --gtest_brief=1 || failed+=("$program")
done
if [ ${#failed[@]} -gt 0 ]; then
  printf '%s: failed: %s\n' "$preset" "${failed[*]}" >&2
  exit 1
fi
printf '\n%s: all tests passed\n' "$preset"
