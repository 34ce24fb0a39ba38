#pragma once

// Included by this folder's files and those of avx512 only, below their target pragma.

#include <immintrin.h>

#include <algorithm>

#include "kernels/float_types.h"
#include "kernels/packed_layout.h"

// GCC 12 keeps arrays of registers in memory unless the loops over them are unrolled early.
#if !defined(QUANTAL_UNROLL)
#define QUANTAL_UNROLL _Pragma("GCC unroll 8")
#endif

namespace quantal::kernels {
namespace {

constexpr std::int64_t kHalfRows = 8;  ///< a register of fp32 has half the rows of a tile

/// 8 numbers at data[index] as fp32.
inline __m256 load_rows(const void* data, std::int64_t index, FloatType type) {
  if (type == FloatType::kF32) return _mm256_loadu_ps(static_cast<const float*>(data) + index);
  const __m128i half = _mm_loadu_si128(
      reinterpret_cast<const __m128i*>(static_cast<const std::uint16_t*>(data) + index));
  if (type == FloatType::kF16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/// data[index, index + count) as fp32.
inline void load_floats(const void* data, std::int64_t index, std::int64_t count, FloatType type,
                        float* to) {
  if (count < kHalfRows) {
    if (type == FloatType::kF32) {
      std::copy_n(static_cast<const float*>(data) + index, count, to);
      return;
    }
    for (std::int64_t i = 0; i < count; ++i) to[i] = load_float(data, index + i, type);
    return;
  }
  for (std::int64_t i = 0; i < count; i += kHalfRows) {
    const std::int64_t at = std::min(i, count - kHalfRows);
    _mm256_storeu_ps(to + at, load_rows(data, index + at, type));
  }
}

/// bf16 numbers in the low halves of 8 words, rounded half to even; NaN stays NaN.
inline __m256i round_to_bf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(is_nan)), 16);
}

/// The first `count` (7 or fewer) of `value`.
inline void store_part(float* to, std::int64_t count, __m256 value) {
  __m128 rest = _mm256_castps256_ps128(value);
  if ((count & 4) != 0) {
    _mm_storeu_ps(to, rest);
    rest = _mm256_extractf128_ps(value, 1);
    to += 4;
  }
  if ((count & 2) != 0) {
    _mm_storel_pi(reinterpret_cast<__m64*>(to), rest);
    rest = _mm_movehl_ps(rest, rest);
    to += 2;
  }
  if ((count & 1) != 0) _mm_store_ss(to, rest);
}

/// The first `rows` (8 or fewer) of `value`, as `type`, at data[index].
inline void store_rows(void* data, std::int64_t index, FloatType type, std::int64_t rows,
                       __m256 value) {
  if (rows < kHalfRows) {
    if (type == FloatType::kF32) return store_part(static_cast<float*>(data) + index, rows, value);
    float values[kHalfRows];
    _mm256_storeu_ps(values, value);
    for (std::int64_t r = 0; r < rows; ++r) store_float(data, index + r, type, values[r]);
    return;
  }
  if (type == FloatType::kF32) {
    _mm256_storeu_ps(static_cast<float*>(data) + index, value);
    return;
  }
  __m128i half;
  if (type == FloatType::kF16) {
    half = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    const __m256i words = round_to_bf16(value);
    half = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<std::uint16_t*>(data) + index), half);
}

/// Rows [first, first + count) of a bias, the others zero; zeros without a bias.
inline __m256 load_bias(const void* bias, std::int64_t first, std::int64_t count, FloatType type) {
  if (bias == nullptr) return _mm256_setzero_ps();
  if (count >= kHalfRows) return load_rows(bias, first, type);
  float values[kHalfRows] = {};
  for (std::int64_t r = 0; r < count; ++r) values[r] = load_float(bias, first + r, type);
  return _mm256_loadu_ps(values);
}

/// Rows of 8 numbers as columns.
inline void transpose(__m256 (&rows)[8]) {
  __m256 pairs[8], quads[8];
  QUANTAL_UNROLL for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  QUANTAL_UNROLL for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
  }
  QUANTAL_UNROLL for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

/// The scales of 8 rows of a tile's group, and the shifts (zeros for symmetric types).
struct HalfScales {
  HalfScales(const PackedLayout& layout, const std::byte* tile, std::int64_t group, int half) {
    const std::byte* scales =
        tile + layout.group_offset(group) + layout.group_lines(group) * PackedLayout::kLineBytes;
    const FloatType type = layout.spec().scale_type;
    scale = load_rows(scales, half * kHalfRows, type);
    shift = layout.is_affine() ? load_rows(scales, PackedLayout::kTileRows + half * kHalfRows, type)
                               : _mm256_setzero_ps();
  }
  __m256 scale, shift;
};

}  // namespace
}  // namespace quantal::kernels
