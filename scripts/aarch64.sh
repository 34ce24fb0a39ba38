#!/usr/bin/env bash
# Builds the kernels and their tests for AArch64 and runs them on emulated processors: one with
# every extension that there are kernels for and one with none; on a third, with dot products alone,
# the choice of kernels. Emulation is slow: of the long tests, every 13th case runs, and what runs on
# portable kernels there is left to the machine itself.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "$(uname -m)" = aarch64 ]; then
  echo "aarch64: this machine is one, and ctest runs these tests"
  exit
fi
build=build/aarch64
cmake --preset aarch64 >/dev/null
cmake --build --preset aarch64

# run PROCESSOR FILTER ISAS: the tests that FILTER names, and that the processor has these.
run() {
  printf 'aarch64: %s\n' "$1"
  QUANTAL_TEST_SAMPLE=13 QUANTAL_TEST_ISAS=$3 qemu-aarch64 -cpu "$1" -L /usr/aarch64-linux-gnu \
    $build/tests/kernels/kernels_test --gtest_brief=1 --gtest_filter="$2"
}

elsewhere='*/portable_*:*QuantizeWeight*:*Gathered*:*NonFinite*:*CanonicalLinear*float8*'
elsewhere+=':*IntegerConv*qint8*:*IntegerConv*qint2*:*IntegerConv*/neon_dotprod_*'
run max "-$elsewhere" 'neon_bf16 neon_i8mm neon_dotprod neon portable' &
many=$!
status=0
run cortex-a57 "-$elsewhere" 'neon portable' || status=1
run cortex-a76 'Isa.*:Variants.*' 'neon_dotprod neon portable' || status=1
wait $many || status=1
exit $status
