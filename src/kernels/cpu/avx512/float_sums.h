#pragma once

// Included by files for AVX-512 and what it is a part of, below their target pragma.

#include "kernels/cpu/avx512/rows.h"

namespace quantal::kernels {
namespace {

/// fp32 sums, with shifts where the weight is affine.
template <bool is_affine>
struct FloatSums {
  using Sum = __m512;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum join(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static Sum load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Sum sum) { _mm512_storeu_ps(to, sum); }

  static __m512 apply(__m512 sum, Sum total, const TileScales& scales, const std::int32_t* x_sums,
                      int token) {
    const __m512 scaled = _mm512_fmadd_ps(total, scales.scale, sum);
    if constexpr (!is_affine) return scaled;
    const __m512 x_sum = _mm512_castsi512_ps(_mm512_set1_epi32(x_sums[token]));
    return _mm512_fnmadd_ps(x_sum, scales.shift, scaled);
  }
};

}  // namespace
}  // namespace quantal::kernels
