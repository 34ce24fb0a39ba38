#pragma once

// Included by files for AVX2 with AVX-VNNI, below their target pragma.

#include <immintrin.h>

namespace quantal::kernels {
namespace {

/// sum += Σ of four products of an unsigned and a signed byte, in each 32 bits.
inline __attribute__((always_inline)) void add_byte_products(__m256i& sum, __m256i unsigned_bytes,
                                                             __m256i signed_bytes) {
#if defined(QUANTAL_EMULATE)
  sum = _mm256_dpbusd_avx_epi32(sum, unsigned_bytes, signed_bytes);
#else
  // As in cpu/avx512/vnni.h: GCC 12 copies sums between the intrinsics of a loop.
  __m256i total = sum;
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(total) : "x"(unsigned_bytes), "x"(signed_bytes));
  sum = total;
#endif
}

}  // namespace
}  // namespace quantal::kernels
