#pragma once

// Included by this folder's files only, below their target pragma.

#include <immintrin.h>

#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {
namespace {

/// The numbers that the low eight codes of canonical form (narrow ones a byte each) stand for.
template <QTypeId qtype>
inline __m256 numbers(__m128i bytes) {
  if constexpr (qtype == QTypeId::kInt8) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  } else if constexpr (qtype == QTypeId::kInt4 || qtype == QTypeId::kInt2) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
  } else if constexpr (qtype == QTypeId::kFloat8E5M2) {
    return _mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), bytes));
  } else {
    const __m128i half =
        _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7), _mm_set1_epi16(-0x4080));
    constexpr float kBias = qtype == QTypeId::kFloat8E4M3FN ? 0x1p8F : 0x1p7F;
    return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(kBias));
  }
}

/// Stores 8 numbers as store_rows() does; fp16 saturates.
inline void store_numbers(void* y, std::int64_t index, FloatType type, __m256 value) {
  if (type == FloatType::kF16) {
    value = _mm256_max_ps(_mm256_min_ps(value, _mm256_set1_ps(65504)), _mm256_set1_ps(-65504));
  }
  store_rows(y, index, type, kHalfRows, value);
}

}  // namespace
}  // namespace quantal::kernels
