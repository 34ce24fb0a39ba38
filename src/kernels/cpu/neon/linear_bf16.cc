// Weight-only linear for bf16 activations, with FEAT_BF16: bfmmla multiplies 2 rows by 2 tokens,
// four columns at once. Every code is exact in bf16, and scale and shift are applied to fp32 sums,
// so that only fp32 additions round. The instruction takes denormal activations (below 2^-126) for
// zeros. Few tokens and many go the ways of linear.cc.
#include "kernels/linear.h"

#include <arm_neon.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels/for_qtype.h"
#include "kernels/scratch.h"

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+bf16")

#include "kernels/cpu/neon/activations.h"
#include "kernels/cpu/neon/numbers.h"
#include "kernels/cpu/neon/tile_sums.h"

namespace quantal::kernels {
namespace {

constexpr int kBlockPairs = 3;  ///< of tokens: with 16 rows, 24 registers of sums
constexpr std::int64_t kColumns = 4;

/// 4 rows by 4 columns: the rows 0 and 1, and 2 and 3.
using RowPairs = std::array<bfloat16x8_t, 2>;

inline bfloat16x8_t as_bf16(uint8x16_t bytes) { return vreinterpretq_bf16_u8(bytes); }

// Numbers that are exact in bf16.
inline bfloat16x8_t top_halves(float32x4_t first, float32x4_t second) {
  return vreinterpretq_bf16_u16(
      vuzp2q_u16(vreinterpretq_u16_f32(first), vreinterpretq_u16_f32(second)));
}

/// A quarter of a line (4 rows), taken apart into planes of four columns.
template <QTypeId qtype>
struct QuarterPlanes {
  static constexpr int kPlanes = 1;

  template <int plane>
  static RowPairs get(uint8x16_t codes) {
    float32x4_t values[4];
    // int8 is packed as code + 128.
    numbers<qtype>(veorq_u8(codes, vdupq_n_u8(qtype == QTypeId::kInt8 ? 0x80 : 0)), values);
    return {top_halves(values[0], values[1]), top_halves(values[2], values[3])};
  }
};

/// The bytes of the bf16 numbers 0 to 15.
struct NarrowTable {
  constexpr NarrowTable() {
    for (int i = 0; i < 16; ++i) {
      const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(i)) >> 16;
      low[i] = static_cast<std::uint8_t>(bits & 0xFF);
      high[i] = static_cast<std::uint8_t>(bits >> 8);
    }
  }
  std::uint8_t low[16] = {}, high[16] = {};
};

template <int bits>
struct NarrowPlanes {
  static constexpr int kPlanes = 8 / bits;

  template <int plane>
  static RowPairs get(uint8x16_t words) {
    uint8x16_t codes = words;
    if constexpr (plane > 0) codes = vshrq_n_u8(codes, bits * plane);
    if constexpr (plane + 1 < kPlanes) codes = vandq_u8(codes, vdupq_n_u8((1 << bits) - 1));
    const uint8x16_t low = vqtbl1q_u8(vld1q_u8(kTable.low), codes);
    const uint8x16_t high = vqtbl1q_u8(vld1q_u8(kTable.high), codes);
    return {as_bf16(vzip1q_u8(low, high)), as_bf16(vzip2q_u8(low, high))};
  }

  static constexpr NarrowTable kTable{};
};

template <>
struct QuarterPlanes<QTypeId::kInt2> : NarrowPlanes<2> {};
template <>
struct QuarterPlanes<QTypeId::kInt4> : NarrowPlanes<4> {};

/// Of one pair: for each 4 rows, of rows 0 and 1, and of 2 and 3: [row][token].
using PairSums = float32x4_t[kQuarters][2];

template <int pairs>
inline void clear(PairSums (&sums)[pairs]) {
  QUANTAL_UNROLL for (int p = 0; p < pairs; ++p) {
    QUANTAL_UNROLL for (int q = 0; q < kQuarters; ++q) sums[p][q][0] = sums[p][q][1] =
        vdupq_n_f32(0);
  }
}

/// Tokens in pairs; a last one that is alone is its own partner.
template <int pairs>
struct TokenPairs {
  TokenPairs(const std::uint16_t* x, std::int64_t stride, std::int64_t tokens) {
    QUANTAL_UNROLL for (int p = 0; p < pairs; ++p) {
      first[p] = x + 2 * p * stride;
      second[p] = x + std::min<std::int64_t>(2 * p + 1, tokens - 1) * stride;
    }
  }

  /// Columns [column, column + 4) of both.
  bfloat16x8_t load(int pair, std::int64_t column) const {
    return vreinterpretq_bf16_u16(
        vcombine_u16(vld1_u16(first[pair] + column), vld1_u16(second[pair] + column)));
  }

  const std::uint16_t *first[pairs], *second[pairs];
};

/// sums[token] += scale · (what the token has of the pairs' sums) − shift · x_sums[token].
template <int pairs>
void add_tokens(const PairSums (&part)[pairs], const TileScales& scales, const float* x_sums,
                std::int64_t tokens, float* sums) {
  for (std::int64_t t = 0; t < tokens; ++t) {
    float32x4_t rows[kQuarters];
    QUANTAL_UNROLL for (int q = 0; q < kQuarters; ++q) {
      const float32x4_t(&both)[2] = part[t / 2][q];
      rows[q] = t % 2 == 0 ? vuzp1q_f32(both[0], both[1]) : vuzp2q_f32(both[0], both[1]);
    }
    add_scaled(rows, scales, x_sums != nullptr ? x_sums[t] : 0.0F, sums + t * kTileRows);
  }
}

template <QTypeId qtype, int pairs>
void multiply_lines(const std::byte* lines, std::int64_t count, const TokenPairs<pairs>& x,
                    PairSums (&sums)[pairs]) {
  using Planes = QuarterPlanes<qtype>;
  clear(sums);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::byte* line = lines + i * kLineBytes;
    __builtin_prefetch(line + kPrefetchBytes);
    for_constants<Planes::kPlanes>([&](auto plane) __attribute__((always_inline)) {
      bfloat16x8_t values[pairs];
      QUANTAL_UNROLL for (int p = 0; p < pairs; ++p) {
        values[p] = x.load(p, (i * Planes::kPlanes + plane) * kColumns);
      }
      QUANTAL_UNROLL for (int q = 0; q < kQuarters; ++q) {
        const RowPairs rows = Planes::template get<plane>(load_quarter(line + q * kQuarterBytes));
        QUANTAL_UNROLL for (int p = 0; p < pairs; ++p) {
          sums[p][q][0] = vbfmmlaq_f32(sums[p][q][0], rows[0], values[p]);
          sums[p][q][1] = vbfmmlaq_f32(sums[p][q][1], rows[1], values[p]);
        }
      }
    });
  }
}

template <QTypeId qtype, int pairs>
void few_tokens(const LinearArgs& args, const Activations<std::uint16_t>& x,
                const ParallelFor& parallel_for) {
  const PackedLayout& layout = *args.layout;
  const GroupSums x_sums(args, x, serial_for);
  parallel_for(layout.tiles(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t tile = begin; tile < end; ++tile) {
      const std::byte* data = args.weight + tile * layout.tile_bytes();
      float sums[2 * pairs * kTileRows] = {};
      for (std::int64_t g = 0; g < layout.groups(); ++g) {
        PairSums part[pairs];
        multiply_lines<qtype, pairs>(data + layout.group_offset(g), layout.group_lines(g),
                                     {x.group(0, g), x.stride(), args.tokens}, part);
        add_tokens<pairs>(part, TileScales(layout, data, g), x_sums.group(g), args.tokens, sums);
      }
      for (std::int64_t t = 0; t < args.tokens; ++t) {
        store_tile(args, tile, t, sums + t * kTileRows);
      }
    }
  });
}

// Takes `count` lines apart: [four columns][quarter][row pair].
template <QTypeId qtype>
void decode_lines(const std::byte* lines, std::int64_t count, bfloat16x8_t* panel) {
  using Planes = QuarterPlanes<qtype>;
  for (std::int64_t i = 0; i < count; ++i, lines += kLineBytes) {
    for_constants<Planes::kPlanes>([&](auto plane) __attribute__((always_inline)) {
      QUANTAL_UNROLL for (int q = 0; q < kQuarters; ++q) {
        const RowPairs rows = Planes::template get<plane>(load_quarter(lines + q * kQuarterBytes));
        *panel++ = rows[0];
        *panel++ = rows[1];
      }
    });
  }
}

/// Part of a group of a tile in bf16, and the tokens that it is multiplied by.
struct PanelJob {
  const bfloat16x8_t* panel;
  std::int64_t columns;  ///< a multiple of 4
  const TileScales& scales;
  const std::uint16_t* x;
  std::int64_t x_stride;
  std::int64_t tokens;
  const float* x_sums;  ///< null: nothing to subtract
  float* sums;
};

template <int pairs>
void multiply_panel(const PanelJob& job) {
  const TokenPairs<pairs> x(job.x, job.x_stride, job.tokens);
  PairSums part[pairs];
  clear(part);
  const bfloat16x8_t* rows = job.panel;
  for (std::int64_t c = 0; c < job.columns; c += kColumns, rows += 2 * kQuarters) {
    bfloat16x8_t values[pairs];
    QUANTAL_UNROLL for (int p = 0; p < pairs; ++p) values[p] = x.load(p, c);
    QUANTAL_UNROLL for (int q = 0; q < kQuarters; ++q) {
      const bfloat16x8_t low = rows[2 * q], high = rows[2 * q + 1];
      QUANTAL_UNROLL for (int p = 0; p < pairs; ++p) {
        part[p][q][0] = vbfmmlaq_f32(part[p][q][0], low, values[p]);
        part[p][q][1] = vbfmmlaq_f32(part[p][q][1], high, values[p]);
      }
    }
  }
  add_tokens<pairs>(part, job.scales, job.x_sums, job.tokens, job.sums);
}

constexpr std::array kMultiplyPanel = {multiply_panel<1>, multiply_panel<2>, multiply_panel<3>};
static_assert(kMultiplyPanel.size() == kBlockPairs);

// sums[token] += the tile's group times every token.
template <QTypeId qtype>
void multiply_group(const LinearArgs& args, const Activations<std::uint16_t>& x,
                    const float* x_sums, const std::byte* tile, std::int64_t g, float* panel,
                    float* sums) {
  constexpr std::int64_t kDepth = QuarterPlanes<qtype>::kPlanes * kColumns;
  constexpr std::int64_t kLines = kPanelColumns / kDepth;
  const PackedLayout& layout = *args.layout;
  const TileScales scales(layout, tile, g);
  auto* decoded = reinterpret_cast<bfloat16x8_t*>(panel);
  for (std::int64_t i = 0; i < layout.group_lines(g); i += kLines) {
    const std::int64_t count = std::min(kLines, layout.group_lines(g) - i);
    decode_lines<qtype>(tile + layout.group_offset(g) + i * kLineBytes, count, decoded);
    for (std::int64_t t = 0; t < args.tokens; t += 2 * kBlockPairs) {
      const std::int64_t tokens = std::min<std::int64_t>(2 * kBlockPairs, args.tokens - t);
      kMultiplyPanel[(tokens + 1) / 2 - 1]({.panel = decoded,
                                            .columns = count * kDepth,
                                            .scales = scales,
                                            .x = x.group(t, g) + i * kDepth,
                                            .x_stride = x.stride(),
                                            .tokens = tokens,
                                            .x_sums = i == 0 ? x_sums + t : nullptr,
                                            .sums = sums + t * kTileRows});
    }
  }
}

template <QTypeId qtype>
void run(const LinearArgs& args, const ParallelFor& parallel_for) {
  const Activations<std::uint16_t> x(args, parallel_for);
  if (args.tokens <= 2) return few_tokens<qtype, 1>(args, x, parallel_for);
  if (args.tokens <= kFewTokens) return few_tokens<qtype, 2>(args, x, parallel_for);
  many_tokens(
      args, x,
      [&](const float* x_sums, const std::byte* tile, std::int64_t g, float* panel, float* sums) {
        multiply_group<qtype>(args, x, x_sums, tile, g, panel, sums);
      },
      parallel_for);
}

}  // namespace

void linear__neon_bf16(const LinearArgs& args, const ParallelFor& parallel_for) {
  if (args.tokens == 0) return;
  if (args.type != FloatType::kBF16) return linear__neon(args, parallel_for);
  for_qtype(args.layout->spec().qtype, [&]<QTypeId qtype>() { run<qtype>(args, parallel_for); });
}

}  // namespace quantal::kernels

#pragma GCC pop_options
