// Depthwise convolution for AVX2: 16 channels at a time; the products of two taps are added by
// vpmaddwd.
#include "kernels/depthwise.h"

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kChannels = 16;

/// Sums over the taps of 16 channels: of 0-3 and 8-11 in `low`, of the others in `high`, which is
/// how vpunpck leaves them.
struct Sums {
  __m256i low, high;

  void add(__m256i low_pairs, __m256i high_pairs, __m256i low_factors, __m256i high_factors) {
    low = _mm256_add_epi32(low, _mm256_madd_epi16(low_pairs, low_factors));
    high = _mm256_add_epi32(high, _mm256_madd_epi16(high_pairs, high_factors));
  }
  __m256 first() const { return _mm256_cvtepi32_ps(_mm256_permute2x128_si256(low, high, 0x20)); }
  __m256 second() const { return _mm256_cvtepi32_ps(_mm256_permute2x128_si256(low, high, 0x31)); }
};

inline __m256i load_codes(const std::int8_t* codes) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}

inline __m256i load_words(const std::int16_t* words) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
}

template <bool is_affine>
inline void store(const DepthwiseArgs& args, std::int64_t position, std::int64_t c, __m256 total,
                  __m256 x_sum) {
  const DepthwiseWeight& w = args.weight;
  __m256 sum = _mm256_fmadd_ps(total, _mm256_loadu_ps(w.scale + c), _mm256_setzero_ps());
  if constexpr (is_affine) sum = _mm256_fnmadd_ps(x_sum, _mm256_loadu_ps(w.shift + c), sum);
  const __m256 bias = load_bias(args.bias, c, kHalfRows, args.type);
  store_rows(args.y, position * w.channels + c, args.type, kHalfRows,
             _mm256_fmadd_ps(sum, _mm256_set1_ps(args.scale), bias));
}

template <bool is_affine>
void run(const DepthwiseArgs& args) {
  const DepthwiseWeight& w = args.weight;
  const std::int64_t pairs = (w.taps + 1) / 2;
  const std::int64_t whole = w.channels / kChannels * kChannels;
  const __m256i zero = _mm256_setzero_si256(), ones = _mm256_set1_epi16(1);
  for (std::int64_t c = 0; c < whole; c += kChannels) {
    for (std::int64_t i = 0; i < args.positions; ++i) {
      const std::int8_t* const* pixels = args.pixels + i * 2 * pairs;
      Sums total{zero, zero}, x_sum{zero, zero};
      for (std::int64_t pair = 0; pair < pairs; ++pair) {
        const __m256i even = load_codes(pixels[2 * pair] + c);
        const __m256i odd = load_codes(pixels[2 * pair + 1] + c);
        const __m256i low = _mm256_unpacklo_epi16(even, odd);
        const __m256i high = _mm256_unpackhi_epi16(even, odd);
        // Of channels 0-7 and 8-15, in the order of the halves above.
        const std::int16_t* factors = w.codes + (pair * w.channels + c) * 2;
        const __m256i first = load_words(factors), second = load_words(factors + kChannels);
        total.add(low, high, _mm256_permute2x128_si256(first, second, 0x20),
                  _mm256_permute2x128_si256(first, second, 0x31));
        if constexpr (is_affine) x_sum.add(low, high, ones, ones);
      }
      store<is_affine>(args, i, c, total.first(), x_sum.first());
      store<is_affine>(args, i, c + kHalfRows, total.second(), x_sum.second());
    }
  }
  depthwise_channels(args, whole);
}

}  // namespace

void depthwise__avx2(const DepthwiseArgs& args) {
  if (args.weight.shift != nullptr) return run<true>(args);
  run<false>(args);
}

}  // namespace quantal::kernels

#pragma GCC pop_options
