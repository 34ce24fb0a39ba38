#pragma once

// Included by this folder's files only, below their target pragma.
//
// The panels of row_blocks.h for AVX2: they stay in the second-level cache; 6 tokens by 16 rows of
// the result stay in registers, and the tokens in the first-level cache until every panel has had
// them.

#include <immintrin.h>

#include <utility>

#include "kernels/cpu/avx2/decode.h"
#include "kernels/cpu/avx2/rows.h"
#include "kernels/row_blocks.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTileRows = PackedLayout::kTileRows;
constexpr std::int64_t kLineBytes = PackedLayout::kLineBytes;
constexpr std::int64_t kPanelColumns = 256;

// Calls step(column) for every column of a line, with the column known at compile time.
template <int depth, typename Step>
inline __attribute__((always_inline)) void for_columns(const Step& step) {
  [&]<int... columns>(std::integer_sequence<int, columns...>) {
    (step(std::integral_constant<int, columns>()), ...);
  }(std::make_integer_sequence<int, depth>());
}

/// The scales and shifts of a tile's group.
struct TileScales {
  TileScales(const PackedLayout& layout, const std::byte* tile, std::int64_t group)
      : low(layout, tile, group, 0), high(layout, tile, group, 1) {}
  HalfScales low, high;
};

// Takes `count` lines of a group apart into 16 numbers a column. What the next panel takes of this
// tile comes from memory meanwhile.
template <QTypeId qtype>
void decode_lines(const std::byte* lines, std::int64_t count, const TileScales& scales,
                  float* panel) {
  constexpr std::int64_t kPanelBytes = kPanelColumns / HalfLine<qtype>::kDepth * kLineBytes;
  for (std::int64_t i = 0; i < count; ++i, lines += kLineBytes) {
    _mm_prefetch(reinterpret_cast<const char*>(lines) + kPanelBytes, _MM_HINT_T1);
    const HalfLine<qtype> low(lines), high(lines + kLineBytes / 2);
    for_columns<HalfLine<qtype>::kDepth>([&](auto column) __attribute__((always_inline)) {
      const __m256 w_low = low.template get<column>(), w_high = high.template get<column>();
      float* to = panel + column * kTileRows;
      _mm256_store_ps(to, _mm256_fmsub_ps(w_low, scales.low.scale, scales.low.shift));
      _mm256_store_ps(to + kHalfRows,
                      _mm256_fmsub_ps(w_high, scales.high.scale, scales.high.shift));
    });
    panel += HalfLine<qtype>::kDepth * kTileRows;
  }
}

// sums[token][16] += Σ x[token][c] · panel[c][16]; sums of two tokens are `stride` apart.
// `Block` reads x: a value of column(c), the same for all tokens, and of the token.
template <int tokens, typename Block>
void multiply_panel(const Block& given, const float* panel, std::int64_t columns, float* sums,
                    std::int64_t stride) {
  const Block x = given;  // whose address nobody has: it stays in registers
  __m256 low[tokens], high[tokens];
  QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
    low[t] = _mm256_load_ps(sums + t * stride);
    high[t] = _mm256_load_ps(sums + t * stride + kHalfRows);
  }
  for (std::int64_t c = 0; c < columns; ++c, panel += kTileRows) {
    const __m256 w_low = _mm256_load_ps(panel), w_high = _mm256_load_ps(panel + kHalfRows);
    const auto column = x.column(c);
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      const __m256 value = _mm256_broadcast_ss(x.at(t, column));
      low[t] = _mm256_fmadd_ps(w_low, value, low[t]);
      high[t] = _mm256_fmadd_ps(w_high, value, high[t]);
    }
  }
  QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
    _mm256_store_ps(sums + t * stride, low[t]);
    _mm256_store_ps(sums + t * stride + kHalfRows, high[t]);
  }
}

template <typename Block>
using MultiplyPanel = void (*)(const Block&, const float*, std::int64_t, float*, std::int64_t);
template <typename Block>
constexpr MultiplyPanel<Block> kMultiplyPanel[kBlockTokens + 1] = {nullptr,
                                                                   multiply_panel<1, Block>,
                                                                   multiply_panel<2, Block>,
                                                                   multiply_panel<3, Block>,
                                                                   multiply_panel<4, Block>,
                                                                   multiply_panel<5, Block>,
                                                                   multiply_panel<6, Block>};

template <QTypeId qtype>
struct Panels {
  static constexpr std::int64_t kColumns = kPanelColumns;
  static constexpr std::int64_t kDepth = HalfLine<qtype>::kDepth;

  static void decode(const PackedLayout& layout, const std::byte* tile, std::int64_t group,
                     std::int64_t first, std::int64_t count, float* panel) {
    decode_lines<qtype>(tile + layout.group_offset(group) + first * kLineBytes, count,
                        TileScales(layout, tile, group), panel);
  }

  template <typename Block>
  static void multiply(const Block& block, std::int64_t count, const float* panels,
                       std::int64_t tiles, std::int64_t columns, float* sums) {
    const MultiplyPanel<Block> by_panel = kMultiplyPanel<Block>[count];
    for (std::int64_t i = 0; i < tiles; ++i) {
      by_panel(block, panels + i * kColumns * kTileRows, columns, sums + i * kTileRows,
               tiles * kTileRows);
    }
  }
};

}  // namespace
}  // namespace quantal::kernels
