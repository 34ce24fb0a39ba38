#pragma once

// Included by this folder's files only, below their target pragma.

#include "kernels/cpu/neon/float8.h"
#include "kernels/cpu/neon/rows.h"

namespace quantal::kernels {
namespace {

/// A quarter of a line (4 rows of `depth` columns), taken apart column by column into 4 floats.
template <QTypeId qtype>
struct QuarterLine;

// A code is masked where it lies; the conversion takes it for a fixed-point number of so many
// fractional bits, which saves a shift.
template <int bits>
struct NarrowQuarterLine {
  static constexpr int kDepth = 32 / bits;
  explicit NarrowQuarterLine(const std::byte* line)
      : words(vreinterpretq_u32_u8(load_quarter(line))) {}

  template <int column>
  float32x4_t get() const {
    constexpr int kByte = 8 * (column % 4), kPlane = bits * (column / 4);
    uint32x4_t plane = words;
    if constexpr (kPlane > 0) plane = vshrq_n_u32(words, kPlane);
    const uint32x4_t code = vandq_u32(plane, vdupq_n_u32(((1U << bits) - 1) << kByte));
    if constexpr (kByte == 0) return vcvtq_f32_u32(code);
    if constexpr (kByte > 0) return vcvtq_n_f32_u32(code, kByte);
  }

  uint32x4_t words;
};

template <>
struct QuarterLine<QTypeId::kInt2> : NarrowQuarterLine<2> {
  using NarrowQuarterLine::NarrowQuarterLine;
};
template <>
struct QuarterLine<QTypeId::kInt4> : NarrowQuarterLine<4> {
  using NarrowQuarterLine::NarrowQuarterLine;
};

// A table lookup moves a column to the top bytes of words, all other bytes zero: a fixed-point
// number again.
template <>
struct QuarterLine<QTypeId::kInt8> {
  static constexpr int kDepth = 4;
  explicit QuarterLine(const std::byte* line)
      : codes(veorq_u8(load_quarter(line), vdupq_n_u8(0x80))) {}

  template <int column>
  float32x4_t get() const {
    // Little-endian words of FF (out of range: zero) below an index of row r's column, 4r + column.
    constexpr std::uint32_t kZeros = 0x00FFFFFF | static_cast<std::uint32_t>(column) << 24;
    constexpr uint32x4_t kIndices = {kZeros, kZeros + (4U << 24), kZeros + (8U << 24),
                                     kZeros + (12U << 24)};
    const uint8x16_t top = vqtbl1q_u8(codes, vreinterpretq_u8_u32(kIndices));
    return vcvtq_n_f32_s32(vreinterpretq_s32_u8(top), 24);
  }

  uint8x16_t codes;
};

// Two columns of 4 rows each are the top bytes of halves.
template <QTypeId qtype>
struct QuarterLine {
  static constexpr int kDepth = 4;
  explicit QuarterLine(const std::byte* line) {
    constexpr uint16x8_t kFirst = {0x00FF, 0x04FF, 0x08FF, 0x0CFF, 0x01FF, 0x05FF, 0x09FF, 0x0DFF};
    const uint8x16_t bytes = load_quarter(line);
    const uint16x8_t second = vorrq_u16(kFirst, vdupq_n_u16(0x200));
    halves[0] = float8_halves<qtype>(top_bytes(bytes, kFirst));
    halves[1] = float8_halves<qtype>(top_bytes(bytes, second));
  }

  template <int column>
  float32x4_t get() const {
    const float16x8_t pair = halves[column / 2];
    return column % 2 == 0 ? float8_low<qtype>(pair) : float8_high<qtype>(pair);
  }

 private:
  static uint16x8_t top_bytes(uint8x16_t bytes, uint16x8_t indices) {
    return vreinterpretq_u16_u8(vqtbl1q_u8(bytes, vreinterpretq_u8_u16(indices)));
  }

  float16x8_t halves[2];
};

}  // namespace
}  // namespace quantal::kernels
