// Quantizing tokens to int8 for AVX-512: the same codes and scales as the portable reading gives.
#include "kernels/token_codes.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/cpu/avx512/intrinsics.h"

#pragma GCC push_options
#if !defined(QUANTAL_EMULATE)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "kernels/cpu/avx512/rows.h"

namespace quantal::kernels {
namespace {

// Lowest bytes of the quotients' codes plus 128, as 32 bits.
__m512i divide(__m512 x, __m512 scale) {
  const __m512 code = _mm512_roundscale_ps(_mm512_div_ps(x, scale), _MM_FROUND_TO_NEAREST_INT);
  return _mm512_add_epi32(_mm512_cvtps_epi32(code), _mm512_set1_epi32(128));
}

// As quantize_codes__avx2() does, of numbers that are at most 127 scales. A division takes 16
// cycles: the product with the inverse, which is less than 2^-15 from the quotient, tells the code
// unless that is next to the middle between two.
bool quantize(const void* x, FloatType type, std::int64_t begin, std::int64_t end, float scale,
              std::int8_t* codes) {
  const __m512 divisor = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(1 / scale);
  // From 256 to 512, fp32 has steps of 2^-15: the lowest 15 bits are the fraction, those above it
  // the integer plus 128.
  const __m512 offset = _mm512_set1_ps(256 + 128);
  const __m512i half = _mm512_set1_epi32(1 << 14), fraction = _mm512_set1_epi32((1 << 15) - 4);
  for (std::int64_t i = begin; i < end; i += 16) {
    const __mmask16 lanes = first_lanes(end - i);
    const __m512 value = load_floats(x, i, type, lanes);
    const __m512i fixed = _mm512_castps_si512(_mm512_fmadd_ps(value, inverse, offset));
    const __m512i rounded = _mm512_add_epi32(fixed, half);
    __m512i raised = _mm512_srli_epi32(rounded, 15);
    // From 2 below the middle to 1 above it, `rounded` is that far from an integer.
    const __m512i distance = _mm512_add_epi32(rounded, _mm512_set1_epi32(2));
    const __mmask16 is_near =
        _mm512_cmpeq_epi32_mask(_mm512_and_si512(distance, fraction), _mm512_setzero_si512());
    if (is_near != 0) raised = divide(value, divisor);
    const __m128i bytes =
        _mm_xor_si128(_mm512_cvtepi32_epi8(raised), _mm_set1_epi8(static_cast<char>(0x80)));
    _mm_mask_storeu_epi8(codes + i, lanes, bytes);
  }
  return true;
}

}  // namespace

void quantize_tokens__avx512(const PackedLayout& layout, const TokenSource& source,
                             std::int64_t begin, std::int64_t end, const TokenCodes& out) {
  quantize_tokens(layout, source, begin, end, out, {max_magnitude, quantize, sum_codes__avx2});
}

}  // namespace quantal::kernels

#pragma GCC pop_options
