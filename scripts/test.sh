#!/usr/bin/env bash
# Runs ctest and pytest on the release build, the kernels' tests for AArch64, and pytest beside
# transformers, each whatever the others say.
set -uo pipefail
cd "$(dirname "$0")/.."

status=0
ctest --preset release || status=1
QUANTAL_LIBRARY=$PWD/build/release/src/libquantal.so .venv/bin/python -m pytest || status=1
scripts/aarch64.sh || status=1
scripts/compat-test.sh || status=1
exit $status
