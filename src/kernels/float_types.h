#pragma once

#include <cstdint>
#include <cstring>

#include <quantal/api.h>

namespace quantal::kernels {

/// The types of activations, outputs, scales and shifts.
enum class FloatType : std::uint8_t { kF32, kBF16, kF16 };

constexpr int size_of(FloatType type) { return type == FloatType::kF32 ? 4 : 2; }

/// One element as fp32; exact.
QUANTAL_API float load_float(const void* data, std::int64_t index, FloatType type);
/// Rounds half to even; NaN stays NaN, fp16 overflows to infinity.
QUANTAL_API void store_float(void* data, std::int64_t index, FloatType type, float value);

/// The same for `count` elements from data[index] on.
QUANTAL_API void store_floats(void* data, std::int64_t index, FloatType type, const float* values,
                              std::int64_t count);

/// The value of a float8 code.
QUANTAL_API float e4m3fn_value(std::uint8_t code);
QUANTAL_API float e4m3fnuz_value(std::uint8_t code);
QUANTAL_API float e5m2_value(std::uint8_t code);

/// The nearest float8 code, halves to the even one. Precondition: |value| is at most the
/// largest number: 448, 240, 57344.
QUANTAL_API std::uint8_t e4m3fn_code(float value);
QUANTAL_API std::uint8_t e4m3fnuz_code(float value);
QUANTAL_API std::uint8_t e5m2_code(float value);

}  // namespace quantal::kernels
