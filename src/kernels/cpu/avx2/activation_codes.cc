// Activations to int8 codes and back for AVX2: the numbers of the portable reading.
#include "kernels/activation_codes.h"

#include <immintrin.h>

#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTogether = 4 * kHalfRows;

// Codes of 32 numbers, of which eight are `values(i)`: quotients by a scale.
template <typename Values>
__m256i pack_codes(const Values& values) {
  const __m256i first = _mm256_packs_epi32(values(0), values(1));
  const __m256i second = _mm256_packs_epi32(values(2), values(3));
  // Packing works on each half of a register by itself.
  return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second),
                                     _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// Saturated; a NaN stays one.
__m256 saturate(__m256 quotient) {
  return _mm256_max_ps(_mm256_set1_ps(-127), _mm256_min_ps(_mm256_set1_ps(127), quotient));
}

template <FloatType type>
bool quantize(const void* x, std::int64_t begin, std::int64_t end, float scale,
              std::int8_t* codes) {
  if (end - begin < kTogether) return quantize_codes__portable(x, type, begin, end, scale, codes);
  const __m256 divisor = _mm256_set1_ps(scale);
  // NaN where a quotient is; others are too small for an infinity.
  __m256 sum = _mm256_setzero_ps();
  for (std::int64_t i = begin; i < end; i += kTogether) {
    // Rather some numbers twice than one by one.
    const std::int64_t index = std::min(i, end - kTogether);
    const __m256i bytes = pack_codes([&](int eight) {
      const __m256 value = load_rows(x, index + eight * kHalfRows, type);
      const __m256 quotient = saturate(_mm256_div_ps(value, divisor));
      sum = _mm256_add_ps(sum, quotient);
      return _mm256_cvtps_epi32(quotient);
    });
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + index), bytes);
  }
  return _mm256_movemask_ps(_mm256_cmp_ps(sum, sum, _CMP_UNORD_Q)) == 0;
}

}  // namespace

bool quantize_codes__avx2(const void* x, FloatType type, std::int64_t begin, std::int64_t end,
                          float scale, std::int8_t* codes) {
  switch (type) {
    case FloatType::kF32:
      return quantize<FloatType::kF32>(x, begin, end, scale, codes);
    case FloatType::kBF16:
      return quantize<FloatType::kBF16>(x, begin, end, scale, codes);
    case FloatType::kF16:
      break;
  }
  return quantize<FloatType::kF16>(x, begin, end, scale, codes);
}

void dequantize_codes__avx2(const std::int8_t* codes, std::int64_t begin, std::int64_t end,
                            float scale, FloatType type, void* y) {
  const __m256 factor = _mm256_set1_ps(scale);
  std::int64_t i = begin;
  for (; i + kHalfRows <= end; i += kHalfRows) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i));
    const __m256 value = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    store_rows(y, i, type, kHalfRows, _mm256_mul_ps(value, factor));
  }
  dequantize_codes__portable(codes, i, end, scale, type, y);
}

float max_magnitude__avx2(const void* x, FloatType type, std::int64_t begin, std::int64_t end) {
  const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
  __m256i most = _mm256_setzero_si256();
  std::int64_t i = begin;
  for (; i + kHalfRows <= end; i += kHalfRows) {
    const __m256i bits = _mm256_castps_si256(load_rows(x, i, type));
    most = _mm256_max_epi32(most, _mm256_and_si256(bits, magnitude));
  }
  alignas(32) std::int32_t lanes[kHalfRows];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
  const float rest = max_magnitude__portable(x, type, i, end);
  std::int32_t top;
  std::memcpy(&top, &rest, sizeof(top));
  for (const std::int32_t lane : lanes) top = top < lane ? lane : top;
  float result;
  std::memcpy(&result, &top, sizeof(result));
  return result;
}

}  // namespace quantal::kernels

#pragma GCC pop_options
