// Integer linear for AVX-512 without VNNI: vpmaddubsw adds products in pairs of 16 bits, vpmaddwd
// pairs of those.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "kernels/cpu/avx512/intrinsics.h"
#include "kernels/cpu/detect.h"
#include "kernels/integer_linear.h"
#include "kernels/scratch.h"

#pragma GCC push_options
#if !defined(QUANTAL_EMULATE)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "kernels/cpu/avx512/integer.h"

namespace quantal::kernels {
namespace {

inline __m512i add_pairs(__m512i sum, __m512i weight, __m512i x) {
  const __m512i pairs = _mm512_maddubs_epi16(weight, x);
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}

template <int bits>
struct PairDot {
  static inline __attribute__((always_inline)) void add(__m512i& sum, __m512i weight, __m512i x) {
    sum = add_pairs(sum, weight, x);
  }
};

template <>
struct PairDot<8> {
  // Two products of 8-bit codes would not fit 16 bits. Without the high bit they do, and so does
  // the high bit alone: 2·128·(−128) is the least number of 16 bits.
  static inline __attribute__((always_inline)) void add(__m512i& sum, __m512i weight, __m512i x) {
    const __m512i high = _mm512_set1_epi8(static_cast<char>(0x80));
    sum = add_pairs(sum, _mm512_andnot_si512(high, weight), x);
    sum = add_pairs(sum, _mm512_and_si512(high, weight), x);
  }
};

}  // namespace

void integer_linear__avx512(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
  integer_linear<PairDot>(args, parallel_for);
}

}  // namespace quantal::kernels

#pragma GCC pop_options
