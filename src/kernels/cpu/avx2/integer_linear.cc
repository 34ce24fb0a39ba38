// Integer linear for AVX2. int4 and int2: vpmaddubsw multiplies unsigned codes by signed ones and
// adds pairs, which fit 16 bits for several lines. int8 pairs would not: its codes are widened to
// 16 bits and go through vpmaddwd.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <utility>

#include "kernels/integer_linear.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/integer.h"

namespace quantal::kernels {
namespace {

// sum + part, now: GCC would add the parts of several steps first, and runs out of registers for
// them.
inline __m256i add_16(__m256i sum, __m256i part) {
  sum = _mm256_add_epi16(sum, part);
  __asm__("" : "+x"(sum));
  return sum;
}
inline __m256i add_32(__m256i sum, __m256i part) {
  sum = _mm256_add_epi32(sum, part);
  __asm__("" : "+x"(sum));
  return sum;
}

/// How codes of 4 and 2 bits are multiplied.
template <int bits>
struct NarrowDot {
  using Code = std::int8_t;
  static constexpr int kDepth = 32 / bits;
  static constexpr int kPlanes = 8 / bits;
  // So many lines of sums of pairs, each at most 2 · (2^bits − 1) · 128, fit 16 bits.
  static constexpr std::int64_t kSafeLines = 32767 / (2 * ((1 << bits) - 1) * 128) / kPlanes;

  /// total[t] += Σ code_w·code_x over `count` lines, for the 8 rows at `lines`.
  template <int tokens>
  static void add(const std::byte* lines, std::int64_t count, const Next& next, const Code* x,
                  std::int64_t stride, __m256i (&total)[tokens]) {
    const __m256i mask = _mm256_set1_epi8((1 << bits) - 1), ones = _mm256_set1_epi16(1);
    for (std::int64_t first = 0; first < count; first += kSafeLines) {
      __m256i pairs[tokens];
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) pairs[t] = _mm256_setzero_si256();
      const std::int64_t end = std::min(count, first + kSafeLines);
      for (std::int64_t i = first; i < end; ++i) {
        const std::byte* line = lines + i * kLineBytes;
        next.fetch(i);
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line));
        QUANTAL_UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
          const __m256i codes = _mm256_and_si256(_mm256_srli_epi16(words, bits * plane), mask);
          QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
            const __m256i values = broadcast_word(x + t * stride + i * kDepth + 4L * plane);
            pairs[t] = add_16(pairs[t], _mm256_maddubs_epi16(codes, values));
          }
        }
      }
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        total[t] = _mm256_add_epi32(total[t], _mm256_madd_epi16(pairs[t], ones));
      }
    }
  }
};

/// How codes of 8 bits, stored as code + 128, are multiplied.
struct ByteDot {
  using Code = std::int16_t;  ///< columns 0, 2, 1, 3 of every four
  static constexpr int kDepth = 4;

  template <int tokens>
  static void add(const std::byte* lines, std::int64_t count, const Next& next, const Code* x,
                  std::int64_t stride, __m256i (&total)[tokens]) {
    const __m256i low = _mm256_set1_epi16(0xFF);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::byte* line = lines + i * kLineBytes;
      next.fetch(i);
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line));
      const __m256i even = _mm256_and_si256(words, low), odd = _mm256_srli_epi16(words, 8);
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        const Code* values = x + t * stride + i * kDepth;
        total[t] = add_32(total[t], _mm256_madd_epi16(even, broadcast_word(values)));
        total[t] = add_32(total[t], _mm256_madd_epi16(odd, broadcast_word(values + 2)));
      }
    }
  }
};

/// Widened to 16 bits.
template <>
class Codes<ByteDot> {
 public:
  Codes(const TokenCodes& x, const ParallelFor& parallel_for)
      : stride_(x.stride() + 32), wide_((x.tokens() * stride_ + 1) / 2) {
    parallel_for(x.tokens(), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) widen(x.codes(t), x.stride(), token(t));
    });
  }
  std::int16_t* token(std::int64_t t) const {
    return reinterpret_cast<std::int16_t*>(wide_.data()) + t * stride_;
  }
  std::int64_t stride() const { return stride_; }

 private:
  // `count` is a multiple of 64. What lies behind the padded columns is not read.
  static void widen(const std::int8_t* from, std::int64_t count, std::int16_t* to) {
    const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    for (std::int64_t i = 0; i < count; i += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, order)));
    }
  }

  std::int64_t stride_;
  Scratch wide_;
};

}  // namespace

void integer_linear__avx2(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
  if (args.source.tokens == 0) return;
  switch (args.layout->spec().qtype) {
    case QTypeId::kInt2:
      return integer_linear<NarrowDot<2>>(args, parallel_for);
    case QTypeId::kInt4:
      return integer_linear<NarrowDot<4>>(args, parallel_for);
    default:
      return integer_linear<ByteDot>(args, parallel_for);
  }
}

}  // namespace quantal::kernels

#pragma GCC pop_options
