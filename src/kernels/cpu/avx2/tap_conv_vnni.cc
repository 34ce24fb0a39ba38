// Convolution by taps for AVX2 with AVX-VNNI: vpdpbusd multiplies the input's codes + 128 by signed
// codes, and sums begin with what that adds to them, the same for all tokens.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "kernels/tap_conv.h"
#if defined(QUANTAL_EMULATE)
#include "kernels/emulated/avx_vnni.h"
#endif

#pragma GCC push_options
#if !defined(QUANTAL_EMULATE)
#pragma GCC target("avxvnni,avx2,fma,f16c")
#endif

#include "kernels/cpu/avx2/taps.h"
#include "kernels/cpu/avx2/vnni.h"

namespace quantal::kernels {
namespace {

struct ByteDot {
  static constexpr int kStepBytes = 64;
  using Code = std::uint8_t;

  static void decode(const std::byte* lines, const TapStep& step, std::byte* to, HalfPair& offset) {
    const __m256i zero_code = _mm256_set1_epi8(static_cast<char>(128));
    const HalfPair words = gather_step(lines, step, {0, 1, 2, 3});
    add_byte_products(offset.low, zero_code, words.low);
    add_byte_products(offset.high, zero_code, words.high);
    store_pair(words, to);
  }

  template <int tokens>
  static inline __attribute__((always_inline)) void add(const std::byte* step, const Code* x,
                                                        std::int64_t stride,
                                                        __m256i (&sums)[tokens][2]) {
    const auto* weight = reinterpret_cast<const __m256i*>(step);
    const __m256i low = _mm256_loadu_si256(weight), high = _mm256_loadu_si256(weight + 1);
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      std::int32_t codes;
      std::memcpy(&codes, x + t * stride, sizeof(codes));
      const __m256i values = _mm256_set1_epi32(codes);
      add_byte_products(sums[t][0], values, low);
      add_byte_products(sums[t][1], values, high);
    }
  }
};

}  // namespace

const TapConvKernel tap_conv__avx_vnni{
    .costs = {45, 10, 1.2F},
    .unit = 1,
    .is_unsigned = true,
    .step_bytes = ByteDot::kStepBytes,
    .decode = decode_steps<ByteDot>,
    .multiply = multiply_block<EachTile<HalvesProduct<ByteDot>>, TapStore>};

}  // namespace quantal::kernels

#pragma GCC pop_options
