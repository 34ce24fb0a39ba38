#pragma once

// Included by this folder's files only, below their target pragma.

#include <immintrin.h>

#include <quantal/qtype.h>

namespace quantal::kernels {
namespace {

/// The numbers that the low eight codes of a float8 type stand for. They go through fp16, whose
/// conversion is exact whatever the processor's denormal mode.
template <QTypeId qtype>
inline __m256 float8_values(__m128i codes) {
  if constexpr (qtype == QTypeId::kFloat8E5M2) {
    return _mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), codes));
  }
  constexpr bool kIsFN = qtype == QTypeId::kFloat8E4M3FN;
  const __m128i words = _mm_cvtepi8_epi16(codes);
  const __m128i half = _mm_and_si128(_mm_slli_epi16(words, 7), _mm_set1_epi16(-0x4080));
  // NaN is the largest magnitude, or else the negative zero.
  const __m128i magnitude = _mm_and_si128(words, _mm_set1_epi16(0x7F));
  const __m128i is_nan = kIsFN ? _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7F))
                               : _mm_cmpeq_epi16(words, _mm_set1_epi16(-0x80));
  return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(half, is_nan)),
                       _mm256_set1_ps(kIsFN ? 0x1p8F : 0x1p7F));
}

}  // namespace
}  // namespace quantal::kernels
