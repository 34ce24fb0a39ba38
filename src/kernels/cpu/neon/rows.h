#pragma once

// Included by this folder's files only, below their target pragma.

#include <arm_neon.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels/float_types.h"
#include "kernels/packed_layout.h"

// GCC 12 keeps arrays of registers in memory unless the loops over them are unrolled early.
#define QUANTAL_UNROLL _Pragma("GCC unroll 8")

namespace quantal::kernels {
namespace {

constexpr std::int64_t kQuarterRows = 4;  ///< a register of fp32 has a quarter of a tile's rows
constexpr int kQuarters = 4;
constexpr std::int64_t kTileRows = PackedLayout::kTileRows;
constexpr std::int64_t kLineBytes = PackedLayout::kLineBytes;
constexpr std::int64_t kQuarterBytes = kLineBytes / kQuarters;
constexpr int kPrefetchBytes = 1024;

/// Calls step(0), step(1), … step(count - 1), each with its number known at compile time: lanes and
/// shifts are parts of the instruction.
template <int count, typename Step>
inline __attribute__((always_inline)) void for_constants(const Step& step) {
  [&]<int... values>(std::integer_sequence<int, values...>) __attribute__((always_inline)) {
    (step(std::integral_constant<int, values>()), ...);
  }(std::make_integer_sequence<int, count>());
}

/// 4 rows of a line.
inline uint8x16_t load_quarter(const std::byte* line) {
  return vld1q_u8(reinterpret_cast<const std::uint8_t*>(line));
}

inline float32x4_t from_bf16(uint16x4_t half) {
  return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

/// 4 numbers at data[index] as fp32.
inline float32x4_t load_rows(const void* data, std::int64_t index, FloatType type) {
  if (type == FloatType::kF32) return vld1q_f32(static_cast<const float*>(data) + index);
  const uint16x4_t half = vld1_u16(static_cast<const std::uint16_t*>(data) + index);
  return type == FloatType::kF16 ? vcvt_f32_f16(vreinterpret_f16_u16(half)) : from_bf16(half);
}

/// bf16 numbers, rounded half to even; NaN stays NaN.
inline uint16x4_t round_to_bf16(float32x4_t value) {
  const uint32x4_t bits = vreinterpretq_u32_f32(value);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(value, value), rounded, quiet), 16);
}

/// The first `rows` (4 or fewer) of `value`, as `type`, at data[index].
inline void store_rows(void* data, std::int64_t index, FloatType type, std::int64_t rows,
                       float32x4_t value) {
  if (rows < kQuarterRows) {
    float values[kQuarterRows];
    vst1q_f32(values, value);
    for (std::int64_t r = 0; r < rows; ++r) store_float(data, index + r, type, values[r]);
    return;
  }
  if (type == FloatType::kF32) {
    vst1q_f32(static_cast<float*>(data) + index, value);
    return;
  }
  vst1_u16(
      static_cast<std::uint16_t*>(data) + index,
      type == FloatType::kF16 ? vreinterpret_u16_f16(vcvt_f16_f32(value)) : round_to_bf16(value));
}

/// Rows [first, first + count) of a bias, the others zero; zeros without a bias.
inline float32x4_t load_bias(const void* bias, std::int64_t first, std::int64_t count,
                             FloatType type) {
  if (bias == nullptr) return vdupq_n_f32(0);
  if (count >= kQuarterRows) return load_rows(bias, first, type);
  float values[kQuarterRows] = {};
  for (std::int64_t r = 0; r < count; ++r) values[r] = load_float(bias, first + r, type);
  return vld1q_f32(values);
}

/// The scales of a tile's group, and the shifts (zeros for symmetric types).
struct TileScales {
  TileScales(const PackedLayout& layout, const std::byte* tile, std::int64_t group) {
    const std::byte* scales =
        tile + layout.group_offset(group) + layout.group_lines(group) * PackedLayout::kLineBytes;
    const FloatType type = layout.spec().scale_type;
    QUANTAL_UNROLL for (int q = 0; q < kQuarters; ++q) {
      const std::int64_t row = q * kQuarterRows;
      scale[q] = load_rows(scales, row, type);
      shift[q] = layout.is_affine() ? load_rows(scales, PackedLayout::kTileRows + row, type)
                                    : vdupq_n_f32(0);
    }
  }
  float32x4_t scale[kQuarters], shift[kQuarters];
};

}  // namespace
}  // namespace quantal::kernels
