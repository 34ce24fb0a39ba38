#pragma once

// Included by this folder's files only, below their target pragma.

#include "kernels/cpu/neon/integer_tile.h"

namespace quantal::kernels {
namespace {

/// Sixteen codes of a token are one register, and multiply four by four, by lane.
template <int bits>
struct LaneDot {
  static constexpr int kDepth = 32 / bits;
  static constexpr int kPlanes = 8 / bits;
  static constexpr int kLines = 16 / kDepth;  ///< for sixteen columns
  static constexpr int kTokens = 8;
  template <int tokens>
  static constexpr int kQuartersAtOnce = tokens <= 4 ? 4 : 2;

  template <int tokens, int quarters>
  static void add(const std::byte* lines, std::int64_t count, const std::int8_t* x,
                  std::int64_t stride, int32x4_t (&total)[tokens][quarters]) {
    std::int64_t i = 0;
    for (; i + kLines <= count; i += kLines) {
      int8x16_t values[tokens];
      load_codes(x + i * kDepth, stride, values);
      for_constants<kLines>([&](auto line) __attribute__((always_inline)) {
        add_line<line * kPlanes>(lines + (i + line) * kLineBytes, values, total);
      });
    }
    // What lies behind the padded columns of a token is its memory too, and not multiplied.
    for (; i < count; ++i) {
      int8x16_t values[tokens];
      load_codes(x + i * kDepth, stride, values);
      add_line<0>(lines + i * kLineBytes, values, total);
    }
  }

 private:
  template <int tokens>
  static __attribute__((always_inline)) void load_codes(const std::int8_t* x, std::int64_t stride,
                                                        int8x16_t (&values)[tokens]) {
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) values[t] = vld1q_s8(x + t * stride);
  }

  template <int lane, int tokens, int quarters>
  static __attribute__((always_inline)) void add_line(const std::byte* line,
                                                      const int8x16_t (&values)[tokens],
                                                      int32x4_t (&total)[tokens][quarters]) {
    __builtin_prefetch(line + kPrefetchBytes);
    QUANTAL_UNROLL for (int q = 0; q < quarters; ++q) {
      const uint8x16_t words = load_quarter(line + q * kQuarterBytes);
      for_constants<kPlanes>([&](auto plane) __attribute__((always_inline)) {
        const int8x16_t codes = plane_codes<bits, plane>(words);
        QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
          total[t][q] = vdotq_laneq_s32(total[t][q], codes, values[t], lane + plane);
        }
      });
    }
  }
};

}  // namespace
}  // namespace quantal::kernels
