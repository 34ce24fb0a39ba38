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

}  // namespace quantal::kernels
