#pragma once

#include <cstdint>

#include <quantal/isa.h>

#include "kernels/packed_layout.h"

/// Activations of one scale for all: value = scale · code.
namespace quantal::kernels {

/// codes[i] = x[i] / scale, rounded half to even and saturated at ±127. False where x has a NaN,
/// which no code can hold; the codes are then unspecified.
QUANTAL_API bool quantize_codes(Isa isa, const void* x, FloatType type, std::int64_t count,
                                float scale, std::int8_t* codes,
                                const ParallelFor& parallel_for = serial_for);

/// y[i] = scale · codes[i] as `type`.
QUANTAL_API void dequantize_codes(Isa isa, const std::int8_t* codes, std::int64_t count,
                                  float scale, FloatType type, void* y,
                                  const ParallelFor& parallel_for = serial_for);

/// The same for elements [begin, end), per instruction set.
using QuantizeCodes = bool (*)(const void* x, FloatType type, std::int64_t begin, std::int64_t end,
                               float scale, std::int8_t* codes);
using DequantizeCodes = void (*)(const std::int8_t* codes, std::int64_t begin, std::int64_t end,
                                 float scale, FloatType type, void* y);
using MaxMagnitude = float (*)(const void* x, FloatType type, std::int64_t begin, std::int64_t end);
QUANTAL_API QuantizeCodes find_quantize_codes(Isa isa);
QUANTAL_API DequantizeCodes find_dequantize_codes(Isa isa);

/// max|x[i]|; a NaN or infinity where x has one.
QUANTAL_API float max_magnitude(Isa isa, const void* x, FloatType type, std::int64_t count,
                                const ParallelFor& parallel_for = serial_for);

/// The dynamic scale of activations of that magnitude: magnitude / 127, not below the smallest
/// normal number; NaN where it is not finite.
QUANTAL_API float scale_for(float magnitude);

bool quantize_codes__portable(const void* x, FloatType type, std::int64_t begin, std::int64_t end,
                              float scale, std::int8_t* codes);
bool quantize_codes__avx2(const void* x, FloatType type, std::int64_t begin, std::int64_t end,
                          float scale, std::int8_t* codes);
bool quantize_codes__neon(const void* x, FloatType type, std::int64_t begin, std::int64_t end,
                          float scale, std::int8_t* codes);
void dequantize_codes__portable(const std::int8_t* codes, std::int64_t begin, std::int64_t end,
                                float scale, FloatType type, void* y);
void dequantize_codes__avx2(const std::int8_t* codes, std::int64_t begin, std::int64_t end,
                            float scale, FloatType type, void* y);
void dequantize_codes__neon(const std::int8_t* codes, std::int64_t begin, std::int64_t end,
                            float scale, FloatType type, void* y);
float max_magnitude__portable(const void* x, FloatType type, std::int64_t begin, std::int64_t end);
float max_magnitude__avx2(const void* x, FloatType type, std::int64_t begin, std::int64_t end);

}  // namespace quantal::kernels
