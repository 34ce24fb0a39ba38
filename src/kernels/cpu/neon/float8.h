#pragma once

// Included by this folder's files only.

#include <arm_neon.h>

#include <quantal/qtype.h>

namespace quantal::kernels {
namespace {

constexpr bool is_float8(QTypeId qtype) {
  return qtype == QTypeId::kFloat8E4M3FN || qtype == QTypeId::kFloat8E4M3FNUZ ||
         qtype == QTypeId::kFloat8E5M2;
}

// float8 goes through fp16, whose conversion is exact whatever the processor's denormal mode.

/// Codes in the top bytes as fp16 numbers, but for a factor. e5m2 is the head of an fp16 number;
/// with four bits of exponent, so is a code moved by one bit, except for NaN: the largest
/// magnitude, or else the negative zero.
template <QTypeId qtype>
inline float16x8_t float8_halves(uint16x8_t top) {
  if constexpr (qtype == QTypeId::kFloat8E5M2) return vreinterpretq_f16_u16(top);
  const int16x8_t moved = vshrq_n_s16(vreinterpretq_s16_u16(top), 1);
  const uint16x8_t half = vbicq_u16(vreinterpretq_u16_s16(moved), vdupq_n_u16(0x4000));
  const uint16x8_t is_nan = qtype == QTypeId::kFloat8E4M3FN
                                ? vceqq_u16(vshlq_n_u16(top, 1), vdupq_n_u16(0xFE00))
                                : vceqq_u16(top, vdupq_n_u16(0x8000));
  return vreinterpretq_f16_u16(vorrq_u16(half, is_nan));
}

template <QTypeId qtype>
inline float32x4_t float8_values(float32x4_t halves) {
  if constexpr (qtype == QTypeId::kFloat8E5M2) return halves;
  return vmulq_n_f32(halves, qtype == QTypeId::kFloat8E4M3FN ? 0x1p8F : 0x1p7F);
}

/// The values of the first four halves, and of the others.
template <QTypeId qtype>
inline float32x4_t float8_low(float16x8_t halves) {
  return float8_values<qtype>(vcvt_f32_f16(vget_low_f16(halves)));
}
template <QTypeId qtype>
inline float32x4_t float8_high(float16x8_t halves) {
  return float8_values<qtype>(vcvt_high_f32_f16(halves));
}

}  // namespace
}  // namespace quantal::kernels
