// Quantizing tokens to int8 for AVX2: the same codes and scales as the portable reading gives.
#include "kernels/token_codes.h"

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels/activation_codes.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace quantal::kernels {

std::int32_t sum_codes__avx2(const std::int8_t* codes, std::int64_t count) {
  constexpr std::int64_t kTogether = 32;
  const std::int64_t whole = count / kTogether * kTogether;
  // Bytes without a sign are summed up at once: each is 128 too large.
  __m256i sums = _mm256_setzero_si256();
  for (std::int64_t i = 0; i < whole; i += kTogether) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    const __m256i raised = _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(0x80)));
    sums = _mm256_add_epi64(sums, _mm256_sad_epu8(raised, _mm256_setzero_si256()));
  }
  const __m128i two =
      _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  const std::int64_t total = _mm_cvtsi128_si64(two) + _mm_extract_epi64(two, 1) - 128 * whole;
  return static_cast<std::int32_t>(total) + sum_codes__portable(codes + whole, count - whole);
}

void quantize_tokens__avx2(const PackedLayout& layout, const TokenSource& source,
                           std::int64_t begin, std::int64_t end, const TokenCodes& out) {
  quantize_tokens(layout, source, begin, end, out,
                  {max_magnitude__avx2, quantize_codes__avx2, sum_codes__avx2});
}

}  // namespace quantal::kernels

#pragma GCC pop_options
