#pragma once

// Included by files for AVX-512 and what it is a part of, below their target pragma.

#include <array>
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

inline __mmask32 first_halves(std::int64_t count) {
  return static_cast<__mmask32>(count >= 32 ? 0xFFFFFFFF : (std::uint64_t{1} << count) - 1);
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
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
  // The upper half of each.
  const __m512i order = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x1F001D, 0x1B0019, 0x170015,
                                         0x130011, 0xF000D, 0xB0009, 0x70005, 0x30001);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(order, quiet));
}

/// The halves first, first + 2 and so on of two registers.
constexpr std::array<std::uint16_t, 32> every_other_half(std::uint16_t first) {
  std::array<std::uint16_t, 32> halves{};
  for (int i = 0; i < 32; ++i) halves[i] = static_cast<std::uint16_t>(first + 2 * i);
  return halves;
}
constexpr auto kLowerHalves = every_other_half(0), kUpperHalves = every_other_half(1);

/// Numbers of two registers, in fewer instructions. Each NaN is a quiet one, as what arithmetic
/// gives is.
inline __m512i round_to_bf16(__m512 first, __m512 second) {
  const __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(second);
  const __m512i lower = _mm512_permutex2var_epi16(a, _mm512_loadu_si512(kLowerHalves.data()), b);
  const __m512i upper = _mm512_permutex2var_epi16(a, _mm512_loadu_si512(kUpperHalves.data()), b);
  // Above the middle, or in the middle and odd.
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi16(1));
  const __m512i magnitude = _mm512_and_si512(upper, _mm512_set1_epi16(0x7FFF));
  const __mmask32 is_number = _mm512_cmple_epu16_mask(magnitude, _mm512_set1_epi16(0x7F80));
  const __mmask32 stays = _mm512_cmple_epu16_mask(_mm512_adds_epu16(lower, odd),
                                                  _mm512_set1_epi16(static_cast<short>(0x8000)));
  return _mm512_mask_add_epi16(upper, is_number & ~stays, upper, _mm512_set1_epi16(1));
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
  __m512i most = _mm512_setzero_si512();
  if (type == FloatType::kF32) {
    const __m512i sign_free = _mm512_set1_epi32(0x7FFFFFFF);
    for (std::int64_t i = begin; i < end; i += 16) {
      const __m512i bits = _mm512_castps_si512(load_floats(x, i, type, first_lanes(end - i)));
      most = _mm512_max_epi32(most, _mm512_and_si512(bits, sign_free));
    }
    const std::int32_t top = _mm512_reduce_max_epi32(most);
    float result;
    std::memcpy(&result, &top, sizeof(result));
    return result;
  }
  const __m512i sign_free = _mm512_set1_epi16(0x7FFF);
  const auto* halves = static_cast<const std::uint16_t*>(x);
  for (std::int64_t i = begin; i < end; i += 32) {
    const __m512i bits = _mm512_maskz_loadu_epi16(first_halves(end - i), halves + i);
    most = _mm512_max_epu16(most, _mm512_and_si512(bits, sign_free));
  }
  const __m256i half =
      _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
  // The largest of 8, as the least of what is left to the largest there is.
  const __m128i quarter =
      _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));
  const auto top = static_cast<std::uint16_t>(~_mm_extract_epi16(least, 0));
  return load_float(&top, 0, type);
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
