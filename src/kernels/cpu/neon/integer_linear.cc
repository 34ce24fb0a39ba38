// Integer linear for NEON without dot products. Codes are multiplied to 16 bits; a register of 4
// rows gives two of products, four a row. Products of int4 and int2 codes are summed in 16 bits for
// several lines; int8 ones fill 16 bits and are summed in pairs to 32 bits at once.
#include "kernels/integer_linear.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "kernels/cpu/neon/integer_tile.h"

namespace quantal::kernels {
namespace {

// Four codes of a token, for every row.
int8x16_t broadcast_codes(const std::int8_t* codes) {
  std::int32_t word;
  std::memcpy(&word, codes, sizeof(word));
  return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

/// What both dot products have in common: two accumulators for each register of 4 rows.
template <int bits>
struct WideningDot {
  static constexpr int kDepth = 32 / bits;
  static constexpr int kPlanes = 8 / bits;
  static constexpr int kTokens = 4;
  template <int tokens>
  static constexpr int kQuartersAtOnce = tokens <= 2 ? 4 : 2;
};

/// Codes of 4 and 2 bits.
template <int bits>
struct Dot : WideningDot<bits> {
  using WideningDot<bits>::kDepth, WideningDot<bits>::kPlanes;
  // So many lines of products, each at most (2^bits − 1) · 128, one a plane, fit 16 bits.
  static constexpr std::int64_t kSafeLines = 32767 / (((1 << bits) - 1) * 128) / kPlanes;

  template <int tokens, int quarters>
  static void add(const std::byte* lines, std::int64_t count, const std::int8_t* x,
                  std::int64_t stride, int32x4_t (&total)[tokens][quarters]) {
    for (std::int64_t first = 0; first < count; first += kSafeLines) {
      int16x8_t low[tokens][quarters], high[tokens][quarters];
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        QUANTAL_UNROLL for (int q = 0; q < quarters; ++q) low[t][q] = high[t][q] = vdupq_n_s16(0);
      }
      const std::int64_t end = std::min(count, first + kSafeLines);
      for (std::int64_t i = first; i < end; ++i) {
        add_line(lines + i * kLineBytes, x + i * kDepth, stride, low, high);
      }
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        QUANTAL_UNROLL for (int q = 0; q < quarters; ++q) {
          const int32x4_t rows = vpaddq_s32(vpaddlq_s16(low[t][q]), vpaddlq_s16(high[t][q]));
          total[t][q] = vaddq_s32(total[t][q], rows);
        }
      }
    }
  }

 private:
  template <int tokens, int quarters>
  static __attribute__((always_inline)) void add_line(const std::byte* line, const std::int8_t* x,
                                                      std::int64_t stride,
                                                      int16x8_t (&low)[tokens][quarters],
                                                      int16x8_t (&high)[tokens][quarters]) {
    __builtin_prefetch(line + kPrefetchBytes);
    for_constants<kPlanes>([&](auto plane) __attribute__((always_inline)) {
      int8x16_t values[tokens];
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        values[t] = broadcast_codes(x + t * stride + 4 * plane);
      }
      QUANTAL_UNROLL for (int q = 0; q < quarters; ++q) {
        const int8x16_t codes = plane_codes<bits, plane>(load_quarter(line + q * kQuarterBytes));
        QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
          low[t][q] = vmlal_s8(low[t][q], vget_low_s8(codes), vget_low_s8(values[t]));
          high[t][q] = vmlal_high_s8(high[t][q], codes, values[t]);
        }
      }
    });
  }
};

/// Codes of 8 bits.
template <>
struct Dot<8> : WideningDot<8> {
  template <int tokens, int quarters>
  static void add(const std::byte* lines, std::int64_t count, const std::int8_t* x,
                  std::int64_t stride, int32x4_t (&total)[tokens][quarters]) {
    int32x4_t low[tokens][quarters], high[tokens][quarters];
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      QUANTAL_UNROLL for (int q = 0; q < quarters; ++q) low[t][q] = high[t][q] = vdupq_n_s32(0);
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const std::byte* line = lines + i * kLineBytes;
      __builtin_prefetch(line + kPrefetchBytes);
      int8x16_t values[tokens];
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        values[t] = broadcast_codes(x + t * stride + i * kDepth);
      }
      QUANTAL_UNROLL for (int q = 0; q < quarters; ++q) {
        const int8x16_t codes = plane_codes<8, 0>(load_quarter(line + q * kQuarterBytes));
        QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
          const int16x8_t first = vmull_s8(vget_low_s8(codes), vget_low_s8(values[t]));
          low[t][q] = vpadalq_s16(low[t][q], first);
          high[t][q] = vpadalq_s16(high[t][q], vmull_high_s8(codes, values[t]));
        }
      }
    }
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      QUANTAL_UNROLL for (int q = 0; q < quarters; ++q) {
        total[t][q] = vaddq_s32(total[t][q], vpaddq_s32(low[t][q], high[t][q]));
      }
    }
  }
};

}  // namespace

void integer_linear__neon(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
  run_any<Dot>(args, parallel_for);
}

}  // namespace quantal::kernels
