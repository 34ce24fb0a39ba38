// Weight-only linear for NEON. Few tokens: every code is decoded in a register and multiplied at
// once; group by group, scale and shift are applied to the sums:
//   y = Σ_g scale_g · Σ_k code_k·x_k − shift_g · Σ_k x_k.
// Many tokens: up to kPanelColumns columns of a tile are taken apart into a panel of floats that
// stays in the first-level cache, and 5 tokens by 16 rows of the result stay in registers.
// Activations are loaded four columns a register, and multiply by lane.
#include "kernels/linear.h"

#include <algorithm>
#include <array>

#include "kernels/cpu/neon/activations.h"
#include "kernels/cpu/neon/decode.h"
#include "kernels/cpu/neon/rows.h"
#include "kernels/cpu/neon/tile_sums.h"
#include "kernels/for_qtype.h"

namespace quantal::kernels {
namespace {

constexpr int kBlockTokens = 5;
constexpr int kLanes = 4;

// Part of a group of a tile, and what it is multiplied by.
struct GroupLines {
  const std::byte* lines;
  std::int64_t count;
  const float* x;  ///< the first token's columns
  std::int64_t x_stride;
};

// Σ code·x of one group of a tile for `tokens` tokens. The sum of a token is kept in several
// chains, since one would wait for each addition.
template <QTypeId qtype, int tokens>
void multiply_lines(const GroupLines& group, float32x4_t (&sums)[tokens][kQuarters]) {
  constexpr int kDepth = QuarterLine<qtype>::kDepth;
  constexpr int kChains = tokens == 1 ? 4 : tokens == 2 ? 2 : 1;
  float32x4_t part[tokens][kQuarters][kChains];
  QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
    QUANTAL_UNROLL for (int q = 0; q < kQuarters; ++q) {
      QUANTAL_UNROLL for (int c = 0; c < kChains; ++c) part[t][q][c] = vdupq_n_f32(0);
    }
  }
  for (std::int64_t i = 0; i < group.count; ++i) {
    const std::byte* line = group.lines + i * kLineBytes;
    __builtin_prefetch(line + kPrefetchBytes);
    for_constants<kDepth / kLanes>([&](auto plane) __attribute__((always_inline)) {
      float32x4_t x[tokens];
      QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
        x[t] = vld1q_f32(group.x + t * group.x_stride + i * kDepth + plane * kLanes);
      }
      QUANTAL_UNROLL for (int q = 0; q < kQuarters; ++q) {
        const QuarterLine<qtype> rows(line + q * kQuarterBytes);
        for_constants<kLanes>([&](auto lane) __attribute__((always_inline)) {
          const float32x4_t w = rows.template get<plane * kLanes + lane>();
          QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
            float32x4_t& sum = part[t][q][lane % kChains];
            sum = vfmaq_laneq_f32(sum, w, x[t], lane);
          }
        });
      }
    });
  }
  QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
    QUANTAL_UNROLL for (int q = 0; q < kQuarters; ++q) {
      sums[t][q] = part[t][q][0];
      QUANTAL_UNROLL for (int c = 1; c < kChains; ++c) {
        sums[t][q] = vaddq_f32(sums[t][q], part[t][q][c]);
      }
    }
  }
}

template <QTypeId qtype, int tokens>
void few_tokens(const LinearArgs& args, const Activations<float>& x,
                const ParallelFor& parallel_for) {
  const PackedLayout& layout = *args.layout;
  const GroupSums x_sums(args, x, serial_for);
  parallel_for(layout.tiles(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t tile = begin; tile < end; ++tile) {
      const std::byte* data = args.weight + tile * layout.tile_bytes();
      float sums[tokens][kTileRows] = {};
      for (std::int64_t g = 0; g < layout.groups(); ++g) {
        float32x4_t part[tokens][kQuarters];
        multiply_lines<qtype, tokens>(
            {data + layout.group_offset(g), layout.group_lines(g), x.group(0, g), x.stride()},
            part);
        const TileScales scales(layout, data, g);
        for (int t = 0; t < tokens; ++t) add_scaled(part[t], scales, x_sums.group(g)[t], sums[t]);
      }
      for (int t = 0; t < tokens; ++t) store_tile(args, tile, t, sums[t]);
    }
  });
}

// Takes `count` lines apart into 16 floats a column.
template <QTypeId qtype>
void decode_lines(const std::byte* lines, std::int64_t count, float* panel) {
  constexpr int kDepth = QuarterLine<qtype>::kDepth;
  for (std::int64_t i = 0; i < count; ++i, lines += kLineBytes, panel += kDepth * kTileRows) {
    QUANTAL_UNROLL for (int q = 0; q < kQuarters; ++q) {
      const QuarterLine<qtype> rows(lines + q * kQuarterBytes);
      for_constants<kDepth>([&](auto column) __attribute__((always_inline)) {
        vst1q_f32(panel + column * kTileRows + q * kQuarterRows, rows.template get<column>());
      });
    }
  }
}

// Part of a group of a tile as floats.
struct Panel {
  const float* values;   ///< [columns][16]
  std::int64_t columns;  ///< a multiple of 4
  const TileScales& scales;
};

// sums[token] += scale · x · panel − shift · x_sums[token]; without x_sums, the first term alone.
template <int tokens>
void multiply_panel(const float* x, std::int64_t x_stride, const Panel& panel, const float* x_sums,
                    float* sums) {
  float32x4_t part[tokens][kQuarters];
  QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
    QUANTAL_UNROLL for (int q = 0; q < kQuarters; ++q) part[t][q] = vdupq_n_f32(0);
  }
  const float* values = panel.values;
  for (std::int64_t c = 0; c < panel.columns; c += kLanes) {
    float32x4_t four[tokens];
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) four[t] = vld1q_f32(x + t * x_stride + c);
    for_constants<kLanes>([&](auto lane) __attribute__((always_inline)) {
      QUANTAL_UNROLL for (int q = 0; q < kQuarters; ++q) {
        const float32x4_t w = vld1q_f32(values + q * kQuarterRows);
        QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
          part[t][q] = vfmaq_laneq_f32(part[t][q], w, four[t], lane);
        }
      }
      values += kTileRows;
    });
  }
  QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
    add_scaled(part[t], panel.scales, x_sums != nullptr ? x_sums[t] : 0.0F, sums + t * kTileRows);
  }
}

using MultiplyPanel = void (*)(const float*, std::int64_t, const Panel&, const float*, float*);
constexpr std::array<MultiplyPanel, kBlockTokens> kMultiplyPanel = {
    multiply_panel<1>, multiply_panel<2>, multiply_panel<3>, multiply_panel<4>, multiply_panel<5>};

// sums[token] += the tile's group times every token.
template <QTypeId qtype>
void multiply_group(const LinearArgs& args, const Activations<float>& x, const float* x_sums,
                    const std::byte* tile, std::int64_t g, float* panel, float* sums) {
  constexpr std::int64_t kDepth = QuarterLine<qtype>::kDepth, kLines = kPanelColumns / kDepth;
  const PackedLayout& layout = *args.layout;
  const TileScales scales(layout, tile, g);
  for (std::int64_t i = 0; i < layout.group_lines(g); i += kLines) {
    const std::int64_t count = std::min(kLines, layout.group_lines(g) - i);
    decode_lines<qtype>(tile + layout.group_offset(g) + i * kLineBytes, count, panel);
    for (std::int64_t t = 0; t < args.tokens; t += kBlockTokens) {
      const std::int64_t tokens = std::min<std::int64_t>(kBlockTokens, args.tokens - t);
      kMultiplyPanel[tokens - 1](x.group(t, g) + i * kDepth, x.stride(),
                                 {panel, count * kDepth, scales}, i == 0 ? x_sums + t : nullptr,
                                 sums + t * kTileRows);
    }
  }
}

template <QTypeId qtype>
void run(const LinearArgs& args, const ParallelFor& parallel_for) {
  const Activations<float> x(args, parallel_for);
  switch (args.tokens) {
    case 1:
      return few_tokens<qtype, 1>(args, x, parallel_for);
    case 2:
      return few_tokens<qtype, 2>(args, x, parallel_for);
    case 3:
      return few_tokens<qtype, 3>(args, x, parallel_for);
    case kFewTokens:
      return few_tokens<qtype, kFewTokens>(args, x, parallel_for);
    default:
      return many_tokens(
          args, x,
          [&](const float* x_sums, const std::byte* tile, std::int64_t g, float* panel,
              float* sums) { multiply_group<qtype>(args, x, x_sums, tile, g, panel, sums); },
          parallel_for);
  }
}

}  // namespace

void linear__neon(const LinearArgs& args, const ParallelFor& parallel_for) {
  if (args.tokens == 0) return;
  for_qtype(args.layout->spec().qtype, [&]<QTypeId qtype>() { run<qtype>(args, parallel_for); });
}

}  // namespace quantal::kernels
