#pragma once

// Included by this folder's files only, below their target pragma: lines of the packed weight,
// taken apart step by step into fp32 (product.h).

#include "kernels/cpu/avx512/rows.h"

namespace quantal::kernels {
namespace {

/// The numbers that codes of 4 or 2 bits stand for: a permutation of 16 numbers looks at the lowest
/// 4 bits of its index, so that no mask is needed.
template <int bits>
__m512 code_values() {
  if constexpr (bits == 2) return _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
  return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

template <int bits>
struct NarrowLine {
  static constexpr int kSteps = 32 / bits;

  void load(const std::byte* line) { words = _mm512_loadu_si512(line); }

  template <int step>
  __m512i get() const {
    constexpr int kBit = bit_of(bits, step);
    const __m512i index = kBit == 0 ? words : _mm512_srli_epi32(words, kBit);
    return _mm512_castps_si512(_mm512_permutexvar_ps(index, code_values<bits>()));
  }

  __m512i words;
};

struct Int8Line {
  static constexpr int kSteps = 4;

  void load(const std::byte* line) {
    words = _mm512_xor_si512(_mm512_loadu_si512(line), _mm512_set1_epi8(static_cast<char>(0x80)));
  }

  template <int step>
  __m512i get() const {
    const __m512i high = step == 3 ? words : _mm512_slli_epi32(words, 24 - 8 * step);
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(high, 24)));
  }

  __m512i words;
};

/// The numbers that 16 float8 codes stand for, given with their signs extended to 16 bits. They go
/// through fp16, whose conversion is exact whatever the processor's denormal mode.
template <QTypeId qtype>
inline __m512 float8_values(__m256i codes) {
  if constexpr (qtype == QTypeId::kFloat8E5M2) return _mm512_cvtph_ps(_mm256_slli_epi16(codes, 8));
  constexpr bool kIsFN = qtype == QTypeId::kFloat8E4M3FN;
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(-0x4080));
  // NaN is the largest magnitude, or else the negative zero.
  const __m256i magnitude = _mm256_and_si256(codes, _mm256_set1_epi16(0x7F));
  const __m256i is_nan = kIsFN ? _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7F))
                               : _mm256_cmpeq_epi16(codes, _mm256_set1_epi16(-0x80));
  return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(half, is_nan)),
                       _mm512_set1_ps(kIsFN ? 0x1p8F : 0x1p7F));
}

template <QTypeId qtype>
struct Float8Line {
  static constexpr int kSteps = 4;

  void load(const std::byte* line) {
    const __m512i transpose = _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400);
    const __m512i gather = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    columns =
        _mm512_permutexvar_epi32(gather, _mm512_shuffle_epi8(_mm512_loadu_si512(line), transpose));
  }

  template <int step>
  __m512i get() const {
    return _mm512_castps_si512(
        float8_values<qtype>(_mm256_cvtepi8_epi16(_mm512_extracti32x4_epi32(columns, step))));
  }

  __m512i columns;
};

template <QTypeId qtype>
struct FloatLine : Float8Line<qtype> {};
template <>
struct FloatLine<QTypeId::kInt2> : NarrowLine<2> {};
template <>
struct FloatLine<QTypeId::kInt4> : NarrowLine<4> {};
template <>
struct FloatLine<QTypeId::kInt8> : Int8Line {};

}  // namespace
}  // namespace quantal::kernels
