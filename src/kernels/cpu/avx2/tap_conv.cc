// Convolution by taps for AVX2: vpmaddwd multiplies pairs of 16-bit numbers, since products of
// bytes would not fit.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "kernels/tap_conv.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/taps.h"

namespace quantal::kernels {
namespace {

// sum += products, now: GCC would add those of several steps first, and runs out of registers for
// them.
inline __attribute__((always_inline)) void add_products(__m256i& sum, __m256i weight, __m256i x) {
  __m256i total = _mm256_add_epi32(sum, _mm256_madd_epi16(weight, x));
  __asm__("" : "+x"(total));
  sum = total;
}

// Bytes 0, 2 and so on as 16-bit numbers.
inline __m256i even_bytes(__m256i bytes) {
  return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
}

/// A step has columns 0 and 1 of all rows as pairs, then 2 and 3.
struct PairDot {
  static constexpr int kStepBytes = 128;
  using Code = std::int16_t;

  // Signed numbers by signed ones add nothing that does not belong.
  static void decode(const std::byte* lines, const TapStep& step, std::byte* to, HalfPair&) {
    const HalfPair words = gather_step(lines, step, {0, 2, 1, 3});
    store_pair({even_bytes(words.low), even_bytes(words.high)}, to);
    store_pair({_mm256_srai_epi16(words.low, 8), _mm256_srai_epi16(words.high, 8)},
               to + kStepBytes / 2);
  }

  template <int tokens>
  static inline __attribute__((always_inline)) void add(const std::byte* step, const Code* x,
                                                        std::int64_t stride,
                                                        __m256i (&sums)[tokens][2]) {
    QUANTAL_UNROLL for (int pair = 0; pair < 2; ++pair) {
      const auto* weight = reinterpret_cast<const __m256i*>(step + pair * kStepBytes / 2);
      const __m256i low = _mm256_loadu_si256(weight), high = _mm256_loadu_si256(weight + 1);
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        std::int32_t both;
        std::memcpy(&both, x + t * stride + 2L * pair, sizeof(both));
        const __m256i values = _mm256_set1_epi32(both);
        add_products(sums[t][0], low, values);
        add_products(sums[t][1], high, values);
      }
    }
  }
};

void widen(const std::int8_t* from, std::int64_t count, std::int16_t* to) {
  for (std::int64_t i = 0; i < count; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_cvtepi8_epi16(bytes));
  }
}

}  // namespace

const TapConvKernel tap_conv__avx2{
    .costs = {18, 5, 1.05F},
    .unit = 1,
    .is_wide = true,
    .step_bytes = PairDot::kStepBytes,
    .decode = decode_steps<PairDot>,
    .multiply = multiply_block<EachTile<HalvesProduct<PairDot>>, TapStore>,
    .widen = widen};

}  // namespace quantal::kernels

#pragma GCC pop_options
