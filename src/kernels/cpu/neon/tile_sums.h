#pragma once

// Included by this folder's files only, below their target pragma.

#include <algorithm>
#include <cstring>

#include "kernels/cpu/neon/activations.h"
#include "kernels/cpu/neon/rows.h"
#include "kernels/linear.h"
#include "kernels/scratch.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kPanelColumns = 256;  ///< of a tile, decoded: half of the first-level cache

/// sums += scale · part − shift · x_sum, for the 16 rows of a tile.
inline void add_scaled(const float32x4_t (&part)[kQuarters], const TileScales& scales, float x_sum,
                       float* sums) {
  QUANTAL_UNROLL for (int q = 0; q < kQuarters; ++q) {
    float* sum = sums + q * kQuarterRows;
    const float32x4_t value = vfmaq_f32(vld1q_f32(sum), part[q], scales.scale[q]);
    vst1q_f32(sum, vfmsq_f32(value, vdupq_n_f32(x_sum), scales.shift[q]));
  }
}

/// Adds the bias and rounds: y[token][tile's rows] = sums.
inline void store_tile(const LinearArgs& args, std::int64_t tile, std::int64_t token,
                       const float* sums) {
  for (int q = 0; q < kQuarters; ++q) {
    const std::int64_t row = tile * kTileRows + q * kQuarterRows;
    const std::int64_t rows = std::min(kQuarterRows, args.layout->spec().rows - row);
    if (rows <= 0) return;
    const float32x4_t bias = load_bias(args.bias, row, rows, args.type);
    store_rows(args.y, token * args.y_stride + row, args.type, rows,
               vaddq_f32(vld1q_f32(sums + q * kQuarterRows), bias));
  }
}

/// Many tokens, tile by tile. multiply_group(x_sums, tile, group, panel, sums) adds a group of a
/// tile times every token to sums ([token][tile's rows]); its panel has room for kPanelColumns of
/// fp32.
template <typename Number, typename MultiplyGroup>
void many_tokens(const LinearArgs& args, const Activations<Number>& x,
                 const MultiplyGroup& multiply_group, const ParallelFor& parallel_for) {
  const PackedLayout& layout = *args.layout;
  const GroupSums x_sums(args, x, parallel_for);
  parallel_for(layout.tiles(), [&](std::int64_t begin, std::int64_t end) {
    const Scratch panel(kPanelColumns * kTileRows), sums(args.tokens * kTileRows);
    for (std::int64_t tile = begin; tile < end; ++tile) {
      const std::byte* data = args.weight + tile * layout.tile_bytes();
      std::memset(sums.data(), 0, args.tokens * kTileRows * sizeof(float));
      for (std::int64_t g = 0; g < layout.groups(); ++g) {
        multiply_group(x_sums.group(g), data, g, panel.data(), sums.data());
      }
      for (std::int64_t t = 0; t < args.tokens; ++t) {
        store_tile(args, tile, t, sums.data() + t * kTileRows);
      }
    }
  });
}

}  // namespace
}  // namespace quantal::kernels
