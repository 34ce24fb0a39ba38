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

# Floats are the same with dot products, and integers with bf16 (variants_test.cc); no kernel here
# takes the longest rows in parts.
elsewhere='*/portable_*:*QuantizeWeight*:*Gathered*:*NonFinite*:*CanonicalLinear*float8*'
elsewhere+=':*/Linear.*/neon_dotprod_*:*/Linear.*/neon_i8mm_*:*Integer*/neon_bf16_*'
elsewhere+=':*ManyTokens.*/neon_dotprod_*:*ManyTokens.*/neon_i8mm_*:*by_the_longest_rows*'
elsewhere+=':*TapConv.*/neon_bf16:*TapConv.*/neon_i8mm'
elsewhere+=':*CanonicalLinear.*/neon_dotprod_*:*CanonicalLinear.*/neon_i8mm_*'
run max "-$elsewhere" 'neon_bf16 neon_i8mm neon_dotprod neon portable' &
many=$!
status=0
run cortex-a57 "-$elsewhere" 'neon portable' || status=1
run cortex-a76 'Isa.*:Variants.*' 'neon_dotprod neon portable' || status=1
wait $many || status=1
exit $status
