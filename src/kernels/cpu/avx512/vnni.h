#pragma once

// Included by files for AVX-512 with VNNI, below their target pragma.

#include "kernels/cpu/avx512/intrinsics.h"

namespace quantal::kernels {
namespace {

/// sum += Σ of four products of an unsigned and a signed byte, in each 32 bits.
inline __attribute__((always_inline)) void add_byte_products(__m512i& sum, __m512i unsigned_bytes,
                                                             __m512i signed_bytes) {
#if defined(QUANTAL_EMULATE)
  sum = _mm512_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
#else
  // GCC 12 copies and spills sums between the intrinsics of a loop; this it leaves in place, but
  // an array's element, without a variable of its own, in memory.
  __m512i total = sum;
  __asm__("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(unsigned_bytes), "v"(signed_bytes));
  sum = total;
#endif
}

}  // namespace
}  // namespace quantal::kernels
