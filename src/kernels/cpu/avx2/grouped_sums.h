#pragma once

// Included by this folder's files only, below their target pragma.

#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {
namespace {

/// 8 codes as fp32.
inline __m256 load_codes(const std::int8_t* codes) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

/// What a row's sums become: its numbers in all lanes, or those of 8 rows.
struct RowFactors {
  __m256 scale, shift, bias;

  template <bool is_affine>
  __m256 finish(__m256 sum, __m256 x_sum, __m256 x_scale) const {
    sum = _mm256_fmadd_ps(sum, scale, _mm256_setzero_ps());
    if constexpr (is_affine) sum = _mm256_fnmadd_ps(x_sum, shift, sum);
    return _mm256_fmadd_ps(sum, x_scale, bias);
  }
};

}  // namespace
}  // namespace quantal::kernels
