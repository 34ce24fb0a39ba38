// Activations to int8 codes and back for NEON: the numbers of the portable reading.
#include "kernels/activation_codes.h"

#include "kernels/cpu/neon/rows.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kCodes = 2 * kQuarterRows;

}  // namespace

bool quantize_codes__neon(const void* x, FloatType type, std::int64_t begin, std::int64_t end,
                          float scale, std::int8_t* codes) {
  const float32x4_t divisor = vdupq_n_f32(scale);
  uint32x4_t are_numbers = vdupq_n_u32(~0U);
  std::int64_t i = begin;
  for (; i + kCodes <= end; i += kCodes) {
    const float32x4_t first = vdivq_f32(load_rows(x, i, type), divisor);
    const float32x4_t second = vdivq_f32(load_rows(x, i + kQuarterRows, type), divisor);
    are_numbers = vandq_u32(are_numbers, vceqq_f32(first, first));
    are_numbers = vandq_u32(are_numbers, vceqq_f32(second, second));
    // Half to even, and saturated at every step.
    const int16x8_t words =
        vqmovn_high_s32(vqmovn_s32(vcvtnq_s32_f32(first)), vcvtnq_s32_f32(second));
    vst1_s8(codes + i, vmax_s8(vqmovn_s16(words), vdup_n_s8(-127)));
  }
  if (vminvq_u32(are_numbers) == 0) return false;
  return quantize_codes__portable(x, type, i, end, scale, codes);
}

void dequantize_codes__neon(const std::int8_t* codes, std::int64_t begin, std::int64_t end,
                            float scale, FloatType type, void* y) {
  std::int64_t i = begin;
  for (; i + kCodes <= end; i += kCodes) {
    const int16x8_t words = vmovl_s8(vld1_s8(codes + i));
    const float32x4_t first = vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)));
    const float32x4_t second = vcvtq_f32_s32(vmovl_high_s16(words));
    store_rows(y, i, type, kQuarterRows, vmulq_n_f32(first, scale));
    store_rows(y, i + kQuarterRows, type, kQuarterRows, vmulq_n_f32(second, scale));
  }
  dequantize_codes__portable(codes, i, end, scale, type, y);
}

}  // namespace quantal::kernels
