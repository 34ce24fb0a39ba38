#include "kernels/float_types.h"

#include <cmath>
#include <limits>

namespace quantal::kernels {
namespace {

float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

std::uint32_t to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float f16_value(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16;
  const std::uint32_t magnitude = half & 0x7FFF;
  if (magnitude >= 0x7C00) return from_bits(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  if (magnitude >= 0x400) return from_bits(sign | ((magnitude << 13) + 0x38000000));
  // By an integer: as a subnormal fp32 number it would depend on the processor's modes.
  return from_bits(sign | to_bits(static_cast<float>(magnitude) * 0x1p-24F));
}

std::uint16_t f16_bits(float value) {
  const std::uint32_t bits = to_bits(value);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  const std::uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return sign | 0x7E00;
  if (magnitude >= 0x477FF000) return sign | 0x7C00;  // rounds to 65536 or more
  if (magnitude < 0x38800000) {                       // below the smallest normal number
    // Adding 0.5 leaves the code in the low bits of the sum, rounded half to even.
    return sign | static_cast<std::uint16_t>(to_bits(from_bits(magnitude) + 0.5F) - 0x3F000000);
  }
  const std::uint32_t odd = magnitude >> 13 & 1;
  return sign | static_cast<std::uint16_t>((magnitude - 0x38000000 + 0xFFF + odd) >> 13);
}

std::uint16_t bf16_bits(float value) {
  const std::uint32_t bits = to_bits(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// With four bits of exponent, a float8 code is the head of an fp16 number of another bias.
float e4m3_value(std::uint8_t code, float factor) {
  const int half = (code & 0x80) << 8 | (code & 0x7F) << 7;
  return f16_value(static_cast<std::uint16_t>(half)) * factor;
}

// The code of a number in range, for so many bits of mantissa and such a bias; sign apart.
template <int mantissa, int bias>
std::uint32_t float8_code(std::uint32_t magnitude) {
  constexpr std::uint32_t kDropped = 23 - mantissa;
  constexpr std::uint32_t kSmallestNormal = static_cast<std::uint32_t>(127 + 1 - bias) << 23;
  if (magnitude < kSmallestNormal) {
    // In this sum the last bit counts the steps between subnormal codes.
    constexpr std::uint32_t kSum = static_cast<std::uint32_t>(127 + 1 - bias + kDropped) << 23;
    return to_bits(from_bits(magnitude) + from_bits(kSum)) - kSum;
  }
  const std::uint32_t half = (1U << (kDropped - 1)) - 1 + (magnitude >> kDropped & 1);
  return ((magnitude + half) >> kDropped) - (static_cast<std::uint32_t>(127 - bias) << mantissa);
}

template <int mantissa, int bias>
std::uint8_t signed_float8_code(float value) {
  const std::uint32_t bits = to_bits(value);
  return static_cast<std::uint8_t>(float8_code<mantissa, bias>(bits & 0x7FFFFFFF) |
                                   (bits >> 24 & 0x80));
}

}  // namespace

float load_float(const void* data, std::int64_t index, FloatType type) {
  if (type == FloatType::kF32) return static_cast<const float*>(data)[index];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(data)[index];
  return type == FloatType::kF16 ? f16_value(bits)
                                 : from_bits(static_cast<std::uint32_t>(bits) << 16);
}

void store_float(void* data, std::int64_t index, FloatType type, float value) {
  if (type == FloatType::kF32) {
    static_cast<float*>(data)[index] = value;
    return;
  }
  static_cast<std::uint16_t*>(data)[index] =
      type == FloatType::kF16 ? f16_bits(value) : bf16_bits(value);
}

void store_floats(void* data, std::int64_t index, FloatType type, const float* values,
                  std::int64_t count) {
  if (type == FloatType::kF32) {
    std::memcpy(static_cast<float*>(data) + index, values, count * sizeof(float));
    return;
  }
  auto* out = static_cast<std::uint16_t*>(data) + index;
  for (std::int64_t i = 0; i < count; ++i) {
    out[i] = type == FloatType::kF16 ? f16_bits(values[i]) : bf16_bits(values[i]);
  }
}

float e4m3fn_value(std::uint8_t code) {
  if ((code & 0x7F) == 0x7F) return std::numeric_limits<float>::quiet_NaN();
  return e4m3_value(code, 0x1p8F);
}

float e4m3fnuz_value(std::uint8_t code) {
  if (code == 0x80) return std::numeric_limits<float>::quiet_NaN();
  return e4m3_value(code, 0x1p7F);
}

float e5m2_value(std::uint8_t code) { return f16_value(static_cast<std::uint16_t>(code << 8)); }

std::uint8_t e4m3fn_code(float value) { return signed_float8_code<3, 7>(value); }

std::uint8_t e4m3fnuz_code(float value) {
  const std::uint8_t code = signed_float8_code<3, 8>(value);
  return code == 0x80 ? 0 : code;  // that would be NaN
}

std::uint8_t e5m2_code(float value) { return signed_float8_code<2, 15>(value); }

}  // namespace quantal::kernels
