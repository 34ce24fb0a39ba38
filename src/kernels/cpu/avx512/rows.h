#pragma once

// Included by files for AVX-512 and what it is a part of, below their target pragma.

#include <cstring>
#include <utility>

#include "kernels/cpu/avx512/intrinsics.h"
#include "kernels/float_types.h"
#include "kernels/packed_layout.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTileRows = PackedLayout::kTileRows;  ///< a register of fp32 has them all
constexpr std::int64_t kLineBytes = PackedLayout::kLineBytes;

inline __mmask16 first_lanes(std::int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1U << count) - 1);
}

/// The chosen of 16 numbers at data[index] as fp32, zeros for the others.
inline __m512 load_floats(const void* data, std::int64_t index, FloatType type, __mmask16 lanes) {
  if (type == FloatType::kF32) {
    return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(data) + index);
  }
  const __m256i half =
      _mm256_maskz_loadu_epi16(lanes, static_cast<const std::uint16_t*>(data) + index);
  if (type == FloatType::kF16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/// Rounded half to even; NaN stays NaN. Not the processor's own conversion, which flushes
/// denormals.
inline __m256i round_to_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, quiet), 16));
}

/// The chosen lanes of `value`, as `type`, at data[index].
inline void store_floats(void* data, std::int64_t index, FloatType type, __mmask16 lanes,
                         __m512 value) {
  if (type == FloatType::kF32) {
    _mm512_mask_storeu_ps(static_cast<float*>(data) + index, lanes, value);
    return;
  }
  const __m256i half = type == FloatType::kF16
                           ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                           : round_to_bf16(value);
  _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(data) + index, lanes, half);
}

/// max|x| as its bits, which order as the numbers do; a NaN or infinity gives at least 0x7F800000.
inline float max_magnitude(const void* x, FloatType type, std::int64_t begin, std::int64_t end) {
  const __m512i sign_free = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i most = _mm512_setzero_si512();
  for (std::int64_t i = begin; i < end; i += 16) {
    const __m512 value = load_floats(x, i, type, first_lanes(end - i));
    most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(value), sign_free));
  }
  const std::int32_t top = _mm512_reduce_max_epi32(most);
  float result;
  std::memcpy(&result, &top, sizeof(result));
  return result;
}

/// The scales of a tile's group, and the shifts (zeros for symmetric types).
struct TileScales {
  TileScales() : scale(_mm512_setzero_ps()), shift(_mm512_setzero_ps()) {}
  TileScales(const PackedLayout& layout, const std::byte* tile, std::int64_t group) : TileScales() {
    const std::byte* scales =
        tile + layout.group_offset(group) + layout.group_lines(group) * kLineBytes;
    const FloatType type = layout.spec().scale_type;
    scale = load_floats(scales, 0, type, first_lanes(kTileRows));
    if (layout.is_affine()) shift = load_floats(scales, kTileRows, type, first_lanes(kTileRows));
  }
  __m512 scale, shift;
};

// Calls body(step) for every step of a line, with the step known at compile time.
template <int steps, typename Body>
inline __attribute__((always_inline)) void for_steps(const Body& body) {
  [&]<int... step>(std::integer_sequence<int, step...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, step>()), ...);
  }(std::make_integer_sequence<int, steps>());
}

}  // namespace
}  // namespace quantal::kernels
