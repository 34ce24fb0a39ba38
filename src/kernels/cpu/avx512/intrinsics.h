#pragma once

// The intrinsics of this folder's files and those of amx: the processor's own, or, in a test
// library, portable ones that compute the same, so that every kernel is tested on machines without
// AVX-512.
#if defined(QUANTAL_EMULATE)
#include "kernels/emulated/avx512.h"
#else
#include <immintrin.h>
#endif

// GCC 12 keeps arrays of registers in memory unless the loops over them are unrolled early. Where
// speed does not matter, that would only take time to compile.
#if defined(QUANTAL_EMULATE) || defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define QUANTAL_UNROLL
#else
#define QUANTAL_UNROLL _Pragma("GCC unroll 16")
#endif
