// Quantizing tokens to int8 for AVX-512: the same codes and scales as the portable reading gives.
#include "kernels/token_codes.h"

#include <algorithm>
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

// As quantize_codes__avx2() does, of numbers without a NaN.
bool quantize(const void* x, FloatType type, std::int64_t begin, std::int64_t end, float scale,
              std::int8_t* codes) {
  const __m512 divisor = _mm512_set1_ps(scale), most = _mm512_set1_ps(127);
  const __m512 least = _mm512_set1_ps(-127);
  for (std::int64_t i = begin; i < end; i += 16) {
    const __mmask16 lanes = first_lanes(end - i);
    const __m512 quotient = _mm512_div_ps(load_floats(x, i, type, lanes), divisor);
    const __m512 code = _mm512_roundscale_ps(quotient, _MM_FROUND_TO_NEAREST_INT);
    const __m512i words = _mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(code, most), least));
    _mm_mask_storeu_epi8(codes + i, lanes, _mm512_cvtepi32_epi8(words));
  }
  return true;
}

}  // namespace

void quantize_tokens__avx512(const PackedLayout& layout, const TokenSource& source,
                             std::int64_t begin, std::int64_t end, const TokenCodes& out) {
  quantize_tokens(layout, source, begin, end, out, max_magnitude, quantize);
}

}  // namespace quantal::kernels

#pragma GCC pop_options
