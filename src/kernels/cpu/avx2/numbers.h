#pragma once

// Included by this folder's files only, below their target pragma.

#include <immintrin.h>

#include "kernels/cpu/avx2/float8.h"
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
  } else {
    return float8_values<qtype>(bytes);
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
