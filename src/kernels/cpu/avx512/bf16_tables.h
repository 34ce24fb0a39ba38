#pragma once

// Included by files for AVX-512 and what it is a part of.

#include <array>
#include <bit>
#include <cstdint>
#include <limits>

#include <quantal/qtype.h>

namespace quantal::kernels {
namespace {

/// The bf16 numbers that all codes of 8 bits stand for (exact, none of them a denormal), as low and
/// high bytes: a permutation looks 64 codes up in 128 entries. int8 by its packed code + 128.
struct ByteTable {
  alignas(64) std::array<std::uint8_t, 256> low, high;
};

constexpr float exponential(int power) {
  float value = 1;
  for (; power > 0; --power) value *= 2;
  for (; power < 0; ++power) value /= 2;
  return value;
}

constexpr float float8_magnitude(int code, int mantissa_bits, int bias) {
  const int exponent = code >> mantissa_bits, mantissa = code & ((1 << mantissa_bits) - 1);
  const float fraction = static_cast<float>(mantissa) / static_cast<float>(1 << mantissa_bits);
  return exponent == 0 ? fraction * exponential(1 - bias)
                       : (1 + fraction) * exponential(exponent - bias);
}

constexpr float byte_value(QTypeId qtype, int code) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const int magnitude = code & 0x7F;
  float value = 0;
  if (qtype == QTypeId::kInt8) return static_cast<float>(code - 128);
  if (qtype == QTypeId::kFloat8E4M3FN) {
    value = magnitude == 0x7F ? kNan : float8_magnitude(magnitude, 3, 7);
  } else if (qtype == QTypeId::kFloat8E4M3FNUZ) {
    value = code == 0x80 ? kNan : float8_magnitude(magnitude, 3, 8);
  } else {
    value = magnitude > 0x7C ? kNan : float8_magnitude(magnitude, 2, 15);
    if (magnitude == 0x7C) value = kInfinity;
  }
  return code >= 0x80 ? -value : value;
}

constexpr ByteTable byte_table(QTypeId qtype) {
  ByteTable table{};
  for (int code = 0; code < 256; ++code) {
    const auto bits = std::bit_cast<std::uint32_t>(byte_value(qtype, code));
    table.low[code] = static_cast<std::uint8_t>(bits >> 16);
    table.high[code] = static_cast<std::uint8_t>(bits >> 24);
  }
  return table;
}

}  // namespace
}  // namespace quantal::kernels
