// Integer linear for AVX2 with AVX-VNNI: vpdpbusd multiplies unsigned weights by signed activations
// and adds to 32 bits, for codes of any width.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels/integer_linear.h"
#if defined(QUANTAL_EMULATE)
#include "kernels/emulated/avx_vnni.h"
#endif

#pragma GCC push_options
#if !defined(QUANTAL_EMULATE)
#pragma GCC target("avxvnni,avx2,fma,f16c")
#endif

#include "kernels/cpu/avx2/integer.h"
#include "kernels/cpu/avx2/vnni.h"

namespace quantal::kernels {
namespace {

template <int bits>
struct VnniDot {
  using Code = std::int8_t;
  static constexpr int kDepth = 32 / bits;
  static constexpr int kPlanes = 8 / bits;

  // Sums of few tokens are kept in several chains, since one would wait for each addition.
  template <int tokens>
  static void add(const std::byte* lines, std::int64_t count, const Next& next, const Code* x,
                  std::int64_t stride, __m256i (&total)[tokens]) {
    constexpr int kChains = tokens <= 2 ? 4 : 1;
    __m256i sums[kChains][tokens];
    QUANTAL_UNROLL for (int c = 0; c < kChains; ++c) {
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) sums[c][t] = _mm256_setzero_si256();
    }
    std::int64_t i = 0;
    for (; i + kChains <= count; i += kChains) {
      QUANTAL_UNROLL for (int c = 0; c < kChains; ++c) {
        next.fetch(i + c);
        add_line(lines + (i + c) * kLineBytes, x + (i + c) * kDepth, stride, sums[c]);
      }
    }
    for (; i < count; ++i) {
      next.fetch(i);
      add_line(lines + i * kLineBytes, x + i * kDepth, stride, sums[0]);
    }
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      QUANTAL_UNROLL for (int c = 0; c < kChains; ++c) {
        total[t] = _mm256_add_epi32(total[t], sums[c][t]);
      }
    }
  }

 private:
  template <int tokens>
  static inline __attribute__((always_inline)) void add_line(const std::byte* line, const Code* x,
                                                             std::int64_t stride,
                                                             __m256i (&sums)[tokens]) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line));
    QUANTAL_UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
      const __m256i mask = _mm256_set1_epi8(static_cast<char>((1 << bits) - 1));
      const __m256i codes =
          bits == 8 ? words : _mm256_and_si256(_mm256_srli_epi16(words, bits * plane), mask);
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        add_byte_products(sums[t], codes, broadcast_word(x + t * stride + 4L * plane));
      }
    }
  }
};

}  // namespace

void integer_linear__avx_vnni(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
  if (args.source.tokens == 0) return;
  switch (args.layout->spec().qtype) {
    case QTypeId::kInt2:
      return integer_linear<VnniDot<2>>(args, parallel_for);
    case QTypeId::kInt4:
      return integer_linear<VnniDot<4>>(args, parallel_for);
    default:
      return integer_linear<VnniDot<8>>(args, parallel_for);
  }
}

}  // namespace quantal::kernels

#pragma GCC pop_options
