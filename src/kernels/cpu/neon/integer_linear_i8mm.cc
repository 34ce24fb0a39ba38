// Integer linear for NEON with matrix products (FEAT_I8MM): smmla multiplies 2 rows by 2 tokens,
// eight columns at once. One token alone would leave half of it idle and goes through sdot.
#include "kernels/integer_linear.h"

#include <arm_neon.h>

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")

#include "kernels/cpu/neon/lane_dot.h"

namespace quantal::kernels {
namespace {

// Sixteen columns are four words a row: word j is in line j / kPlanes, plane j % kPlanes.
template <int bits>
struct MatrixDot {
  static constexpr int kDepth = 32 / bits;
  static constexpr int kPlanes = 8 / bits;
  static constexpr int kLines = 16 / kDepth;  ///< for sixteen columns
  static constexpr int kTokens = 8;
  template <int tokens>
  static constexpr int kQuartersAtOnce = tokens <= 4 ? 4 : 2;

  template <int tokens, int quarters>
  static void add(const std::byte* lines, std::int64_t count, const std::int8_t* x,
                  std::int64_t stride, int32x4_t (&total)[tokens][quarters]) {
    if constexpr (tokens == 1) {
      LaneDot<bits>::add(lines, count, x, stride, total);
    } else {
      // [rows 0 and 1, or 2 and 3][2 tokens each]
      int32x4_t part[kPairs<tokens>][quarters][2];
      QUANTAL_UNROLL for (int p = 0; p < kPairs<tokens>; ++p) {
        QUANTAL_UNROLL for (int q = 0; q < quarters; ++q) {
          part[p][q][0] = part[p][q][1] = vdupq_n_s32(0);
        }
      }
      add_lines<tokens>(lines, count, x, stride, part);
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        QUANTAL_UNROLL for (int q = 0; q < quarters; ++q) {
          const int32x4_t(&rows)[2] = part[t / 2][q];
          total[t][q] = vaddq_s32(total[t][q], t % 2 == 0 ? vuzp1q_s32(rows[0], rows[1])
                                                          : vuzp2q_s32(rows[0], rows[1]));
        }
      }
    }
  }

 private:
  template <int tokens>
  static constexpr int kPairs = (tokens + 1) / 2;

  template <int tokens, int quarters>
  static __attribute__((always_inline)) void add_lines(
      const std::byte* lines, std::int64_t count, const std::int8_t* x, std::int64_t stride,
      int32x4_t (&part)[kPairs<tokens>][quarters][2]) {
    std::int64_t i = 0;
    for (; i + kLines <= count; i += kLines, lines += kLines * kLineBytes) {
      for_constants<kLines>([&](auto line) __attribute__((always_inline)) {
        __builtin_prefetch(lines + line * kLineBytes + kPrefetchBytes);
      });
      int8x16_t values[kPairs<tokens>][2];
      load_pairs<tokens>(x + i * kDepth, stride, values);
      multiply<0, 2>(lines, values, part);
      multiply<1, 4>(lines, values, part);
    }
    // What lies behind the padded columns of a token is its memory too, and multiplied by zeros.
    for (; i < count; ++i, lines += kLineBytes) {
      int8x16_t values[kPairs<tokens>][2];
      load_pairs<tokens>(x + i * kDepth, stride, values);
      multiply<0, kPlanes>(lines, values, part);
    }
  }

  // Sixteen columns of every two tokens: the first eight of both, then the others.
  template <int tokens>
  static __attribute__((always_inline)) void load_pairs(const std::int8_t* x, std::int64_t stride,
                                                        int8x16_t (&values)[kPairs<tokens>][2]) {
    QUANTAL_UNROLL for (int p = 0; p < kPairs<tokens>; ++p) {
      const int other = 2 * p + 1 < tokens ? 2 * p + 1 : 2 * p;
      const int64x2_t one = vreinterpretq_s64_s8(vld1q_s8(x + 2 * p * stride));
      const int64x2_t two = vreinterpretq_s64_s8(vld1q_s8(x + other * stride));
      values[p][0] = vreinterpretq_s8_s64(vzip1q_s64(one, two));
      values[p][1] = vreinterpretq_s8_s64(vzip2q_s64(one, two));
    }
  }

  // Columns [8 step, 8 step + 8), of which there are those of words below `words`.
  template <int step, int words, int pairs, int quarters>
  static __attribute__((always_inline)) void multiply(const std::byte* lines,
                                                      const int8x16_t (&values)[pairs][2],
                                                      int32x4_t (&part)[pairs][quarters][2]) {
    QUANTAL_UNROLL for (int q = 0; q < quarters; ++q) {
      const int32x4_t first = word_codes<2 * step>(lines + q * kQuarterBytes);
      int32x4_t second = vdupq_n_s32(0);
      if constexpr (2 * step + 1 < words) {
        second = word_codes<2 * step + 1>(lines + q * kQuarterBytes);
      }
      const int8x16_t low = vreinterpretq_s8_s32(vzip1q_s32(first, second));
      const int8x16_t high = vreinterpretq_s8_s32(vzip2q_s32(first, second));
      QUANTAL_UNROLL for (int p = 0; p < pairs; ++p) {
        part[p][q][0] = vmmlaq_s32(part[p][q][0], low, values[p][step]);
        part[p][q][1] = vmmlaq_s32(part[p][q][1], high, values[p][step]);
      }
    }
  }

  template <int word>
  static __attribute__((always_inline)) int32x4_t word_codes(const std::byte* quarter) {
    const uint8x16_t words = load_quarter(quarter + word / kPlanes * kLineBytes);
    return vreinterpretq_s32_s8(plane_codes<bits, word % kPlanes>(words));
  }
};

}  // namespace

void integer_linear__neon_i8mm(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
  run_any<MatrixDot>(args, parallel_for);
}

}  // namespace quantal::kernels

#pragma GCC pop_options
