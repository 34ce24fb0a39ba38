#pragma once

// Included by this folder's files only, below their target pragma.
//
// Products of many tokens: some columns of a few tiles are dequantized into panels that stay in the
// second-level cache; 6 tokens by 16 rows of the result stay in registers, and the tokens in the
// first-level cache until every panel has had them.

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/cpu/avx2/decode.h"
#include "kernels/cpu/avx2/rows.h"
#include "kernels/scratch.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTileRows = PackedLayout::kTileRows;
constexpr std::int64_t kLineBytes = PackedLayout::kLineBytes;
constexpr int kBlockTokens = 6;
constexpr std::int64_t kPanelColumns = 256;
constexpr std::int64_t kBlockTiles = 4;
constexpr std::int64_t kBlockRows = kBlockTiles * kTileRows;

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

/// `count` tokens in parts of about the same size, at most `most`.
struct Parts {
  Parts(std::int64_t count, std::int64_t most) : total(count), parts((count + most - 1) / most) {}
  std::int64_t begin(std::int64_t part) const { return total * part / parts; }
  std::int64_t total, parts;
};

/// Sums of tiles [first_tile, first_tile + tiles) by tokens [first, first + tokens).
struct BlockSums {
  const float* at(std::int64_t token, std::int64_t tile) const {
    return sums + token * stride() + tile * kTileRows;
  }
  std::int64_t stride() const { return tiles * kTileRows; }
  std::int64_t first_tile, tiles, first, tokens;
  const float* sums;
};

/// Up to kBlockTiles tiles by a strip of tokens. `Tokens`:
///   kStrip                      how many make a strip
///   columns(group, begin, end)  how many columns it has for those of the lines of a group
///   together(tile)              how many tiles from this one on read the same of a token
///   block(tile, token, count, column)
///                               what multiply_panel() reads from that token and column on
///   store(BlockSums)            adds the bias and rounds
template <QTypeId qtype, typename Tokens>
class RowBlock {
 public:
  RowBlock(const PackedLayout& layout, const std::byte* weight, const Tokens& tokens,
           std::int64_t strip_tokens)
      : layout_(layout),
        weight_(weight),
        x_(tokens),
        panels_(kBlockTiles * kPanelColumns * kTileRows),
        sums_(strip_tokens * kBlockRows) {}

  void multiply(std::int64_t first_tile, std::int64_t tiles, std::int64_t first_token,
                std::int64_t tokens) {
    first_tile_ = first_tile, tiles_ = tiles;
    column_ = filled_ = 0;
    std::memset(sums_.data(), 0, tokens * tiles * kTileRows * sizeof(float));
    for (std::int64_t g = 0; g < layout_.groups(); ++g) {
      const std::int64_t lines = layout_.group_lines(g);
      for (std::int64_t i = 0; i < lines;) {
        if (filled_ + kDepth > kPanelColumns) multiply_panels(first_token, tokens);
        const std::int64_t count = std::min(lines - i, (kPanelColumns - filled_) / kDepth);
        decode(g, i, count);
        filled_ += x_.columns(g, i * kDepth, (i + count) * kDepth);
        i += count;
      }
    }
    multiply_panels(first_token, tokens);
    x_.store({first_tile_, tiles_, first_token, tokens, sums_.data()});
  }

 private:
  static constexpr std::int64_t kDepth = HalfLine<qtype>::kDepth;

  float* panel(std::int64_t index) const {
    return panels_.data() + index * kPanelColumns * kTileRows;
  }

  // Lines [first, first + count) of a group of every tile.
  void decode(std::int64_t group, std::int64_t first, std::int64_t count) {
    for (std::int64_t i = 0; i < tiles_; ++i) {
      const std::byte* tile = weight_ + (first_tile_ + i) * layout_.tile_bytes();
      decode_lines<qtype>(tile + layout_.group_offset(group) + first * kLineBytes, count,
                          TileScales(layout_, tile, group), panel(i) + filled_ * kTileRows);
    }
  }

  // sums += what is decoded, by tokens [first, first + count).
  void multiply_panels(std::int64_t first, std::int64_t count) {
    const Parts blocks(count, kBlockTokens);
    const std::int64_t stride = tiles_ * kTileRows;
    for (std::int64_t b = 0; b < blocks.parts; ++b) {
      const std::int64_t t = blocks.begin(b), size = blocks.begin(b + 1) - t;
      const auto block = x_.block(first_tile_, first + t, size, column_);
      for (std::int64_t i = 0; i < tiles_; ++i) {
        float* const sums = sums_.data() + t * stride + i * kTileRows;
        kMultiplyPanel<decltype(block)>[size](block, panel(i), filled_, sums, stride);
      }
    }
    column_ += filled_;
    filled_ = 0;
  }

  const PackedLayout& layout_;
  const std::byte* weight_;
  const Tokens& x_;
  Scratch panels_, sums_;
  std::int64_t first_tile_ = 0, tiles_ = 0;
  std::int64_t column_ = 0;  ///< of a token, where the panels begin
  std::int64_t filled_ = 0;  ///< columns in the panels
};

/// Every tile by every token, of which there are `count`. A thread takes some tiles by a strip of
/// tokens.
template <QTypeId qtype, typename Tokens>
void multiply_rows(const PackedLayout& layout, const std::byte* weight, const Tokens& tokens,
                   std::int64_t count, const ParallelFor& parallel_for) {
  const Parts strips(count, Tokens::kStrip);
  const std::int64_t tiles = layout.tiles();
  parallel_for(strips.parts * tiles, [&](std::int64_t begin, std::int64_t end) {
    RowBlock<qtype, Tokens> rows(layout, weight, tokens, std::min(count, Tokens::kStrip));
    for (std::int64_t i = begin; i < end;) {
      const std::int64_t strip = i / tiles, tile = i % tiles;
      const std::int64_t block =
          std::min({kBlockTiles, tokens.together(tile), tiles - tile, end - i});
      const std::int64_t token = strips.begin(strip);
      rows.multiply(tile, block, token, strips.begin(strip + 1) - token);
      i += block;
    }
  });
}

}  // namespace
}  // namespace quantal::kernels
