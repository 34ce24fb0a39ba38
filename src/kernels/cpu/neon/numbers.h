#pragma once

// Included by this folder's files only.

#include <arm_neon.h>

#include "kernels/cpu/neon/float8.h"
#include "kernels/cpu/neon/rows.h"

namespace quantal::kernels {
namespace {

/// The numbers that 16 codes of canonical form (narrow ones a byte each) stand for.
template <QTypeId qtype>
inline void numbers(uint8x16_t codes, float32x4_t (&values)[4]) {
  if constexpr (is_float8(qtype)) {
    const uint8x16_t zeros = vdupq_n_u8(0);
    const uint16x8_t first = vreinterpretq_u16_u8(vzip1q_u8(zeros, codes));
    const uint16x8_t second = vreinterpretq_u16_u8(vzip2q_u8(zeros, codes));
    values[0] = float8_low<qtype>(float8_halves<qtype>(first));
    values[1] = float8_high<qtype>(float8_halves<qtype>(first));
    values[2] = float8_low<qtype>(float8_halves<qtype>(second));
    values[3] = float8_high<qtype>(float8_halves<qtype>(second));
  } else {
    // Narrow codes are positive as signed bytes, too.
    const int8x16_t bytes = vreinterpretq_s8_u8(codes);
    const int16x8_t first = vmovl_s8(vget_low_s8(bytes)), second = vmovl_high_s8(bytes);
    values[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(first)));
    values[1] = vcvtq_f32_s32(vmovl_high_s16(first));
    values[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(second)));
    values[3] = vcvtq_f32_s32(vmovl_high_s16(second));
  }
}

/// Stores 4 numbers as store_rows() does; fp16 saturates.
inline void store_numbers(void* y, std::int64_t index, FloatType type, float32x4_t value) {
  if (type == FloatType::kF16) {
    value = vmaxq_f32(vminq_f32(value, vdupq_n_f32(65504)), vdupq_n_f32(-65504));
  }
  store_rows(y, index, type, kQuarterRows, value);
}

}  // namespace
}  // namespace quantal::kernels
