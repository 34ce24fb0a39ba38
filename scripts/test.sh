#!/usr/bin/env bash
# Runs ctest and pytest on the release build, then pytest beside transformers; all of it whatever
# the first says.
set -uo pipefail
cd "$(dirname "$0")/.."

status=0
ctest --preset release || status=1
QUANTAL_LIBRARY=$PWD/build/release/src/libquantal.so .venv/bin/python -m pytest || status=1
scripts/compat-test.sh || status=1
exit $status
