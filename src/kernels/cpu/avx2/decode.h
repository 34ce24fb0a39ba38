#pragma once

// Included by this folder's files only, below their target pragma.

#include <immintrin.h>

#include "kernels/cpu/avx2/float8.h"
#include "kernels/packed_layout.h"

namespace quantal::kernels {
namespace {

/// Half a line (8 rows of `depth` columns), taken apart column by column into 8 floats.
template <QTypeId qtype>
struct HalfLine;

template <int bits>
struct NarrowHalfLine {
  static constexpr int kDepth = 32 / bits;
  explicit NarrowHalfLine(const std::byte* line)
      : words(_mm256_load_si256(reinterpret_cast<const __m256i*>(line))) {}

  template <int column>
  __m256 get() const {
    constexpr int kBit = 8 * (column % 4) + bits * (column / 4);
    const __m256i code = _mm256_srli_epi32(words, kBit);
    if constexpr (kBit + bits == 32) return _mm256_cvtepi32_ps(code);
    return _mm256_cvtepi32_ps(_mm256_and_si256(code, _mm256_set1_epi32((1 << bits) - 1)));
  }

  __m256i words;
};

template <>
struct HalfLine<QTypeId::kInt2> : NarrowHalfLine<2> {
  using NarrowHalfLine::NarrowHalfLine;
};
template <>
struct HalfLine<QTypeId::kInt4> : NarrowHalfLine<4> {
  using NarrowHalfLine::NarrowHalfLine;
};

template <>
struct HalfLine<QTypeId::kInt8> {
  static constexpr int kDepth = 4;
  explicit HalfLine(const std::byte* line)
      : words(_mm256_xor_si256(_mm256_load_si256(reinterpret_cast<const __m256i*>(line)),
                               _mm256_set1_epi8(static_cast<char>(0x80)))) {}

  template <int column>
  __m256 get() const {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 24 - 8 * column), 24));
  }

  __m256i words;
};

template <QTypeId qtype>
struct HalfLine {
  static constexpr int kDepth = 4;
  explicit HalfLine(const std::byte* line) {
    const __m256i rows = _mm256_load_si256(reinterpret_cast<const __m256i*>(line));
    const __m256i transpose =
        _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                         0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    columns = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(rows, transpose),
                                          _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }

  template <int column>
  __m256 get() const {
    const __m128i pair =
        column < 2 ? _mm256_castsi256_si128(columns) : _mm256_extracti128_si256(columns, 1);
    const __m128i bytes = column % 2 == 0 ? pair : _mm_unpackhi_epi64(pair, pair);
    return float8_values<qtype>(bytes);
  }

  __m256i columns;
};

}  // namespace
}  // namespace quantal::kernels
