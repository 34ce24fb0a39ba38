// Activations to int8 codes and back for AVX2: the numbers of the portable reading.
#include "kernels/activation_codes.h"

#include <immintrin.h>

#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {
namespace {

__m256i round_codes(__m256 quotient) {
  const __m256 rounded = _mm256_round_ps(quotient, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 limit = _mm256_set1_ps(127);
  return _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(rounded, limit), _mm256_set1_ps(-127)));
}

}  // namespace

bool quantize_codes__avx2(const void* x, FloatType type, std::int64_t begin, std::int64_t end,
                          float scale, std::int8_t* codes) {
  const __m256 divisor = _mm256_set1_ps(scale);
  __m256 nans = _mm256_setzero_ps();
  std::int64_t i = begin;
  for (; i + 2 * kHalfRows <= end; i += 2 * kHalfRows) {
    const __m256 first = _mm256_div_ps(load_rows(x, i, type), divisor);
    const __m256 second = _mm256_div_ps(load_rows(x, i + kHalfRows, type), divisor);
    nans = _mm256_or_ps(nans, _mm256_cmp_ps(first, second, _CMP_UNORD_Q));
    const __m256i words = _mm256_permute4x64_epi64(
        _mm256_packs_epi32(round_codes(first), round_codes(second)), 0b11011000);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), bytes);
  }
  if (_mm256_movemask_ps(nans) != 0) return false;
  return quantize_codes__portable(x, type, i, end, scale, codes);
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
