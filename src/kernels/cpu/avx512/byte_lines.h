#pragma once

// Included by files for AVX-512 and what it is a part of, below their target pragma: integer
// weights as bytes, and sums of their products.

#include "kernels/cpu/avx512/rows.h"

namespace quantal::kernels {
namespace {

/// Unsigned codes, 4 columns a register.
template <int bits>
struct ByteLine {
  static constexpr int kSteps = 8 / bits;

  void load(const std::byte* line) { words = _mm512_loadu_si512(line); }

  template <int step>
  __m512i get() const {
    if constexpr (bits == 8) return words;
    const __m512i codes = step == 0 ? words : _mm512_srli_epi16(words, bits * step);
    return _mm512_and_si512(codes, _mm512_set1_epi8((1 << bits) - 1));
  }

  __m512i words;
};

/// Sums of products of codes, int32.
template <int bits>
struct ByteSums {
  using Sum = __m512i;

  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum join(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static Sum load(const float* from) { return _mm512_loadu_si512(from); }
  static void store(float* to, Sum sum) { _mm512_storeu_si512(to, sum); }

  /// Σ of a token's codes as apply() wants it: the offset of int8 codes is still an integer.
  static std::int32_t x_sum(std::int32_t sum) {
    return bits == 8 ? 128 * sum : std::bit_cast<std::int32_t>(static_cast<float>(sum));
  }

  // The order of integer_linear.h.
  static __m512 apply(__m512 sum, Sum total, const TileScales& scales, const std::int32_t* x_sums,
                      int token) {
    const __m512i x_sum = _mm512_set1_epi32(x_sums[token]);
    if constexpr (bits == 8) {
      return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(total, x_sum)), scales.scale, sum);
    }
    const __m512 scaled = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scales.scale, sum);
    return _mm512_fnmadd_ps(_mm512_castsi512_ps(x_sum), scales.shift, scaled);
  }
};

}  // namespace
}  // namespace quantal::kernels
