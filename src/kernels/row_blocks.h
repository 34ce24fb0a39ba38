#pragma once

// Included by kernels' files only, below their target pragma.
//
// Products of many tokens in fp32: some columns of a few tiles are dequantized into panels that
// stay in a near cache, and some tokens by some rows of the result stay in registers; every block
// of tokens has a panel before the next one is made.

#include <algorithm>
#include <cstring>

#include "kernels/linear.h"
#include "kernels/scratch.h"

namespace quantal::kernels {
namespace {

constexpr int kBlockTokens = 6;
constexpr std::int64_t kBlockTiles = 4;
constexpr std::int64_t kBlockRows = kBlockTiles * PackedLayout::kTileRows;

/// `count` tokens in parts of about the same size, at most `most`.
struct Parts {
  Parts(std::int64_t count, std::int64_t most) : total(count), parts((count + most - 1) / most) {}
  std::int64_t begin(std::int64_t part) const { return total * part / parts; }
  std::int64_t total, parts;
};

/// Sums of tiles [first_tile, first_tile + tiles) by tokens [first, first + tokens).
struct BlockSums {
  const float* at(std::int64_t token, std::int64_t tile) const {
    return sums + token * stride() + tile * PackedLayout::kTileRows;
  }
  std::int64_t stride() const { return tiles * PackedLayout::kTileRows; }
  std::int64_t first_tile, tiles, first, tokens;
  const float* sums;
};

/// Up to kBlockTiles tiles by a strip of tokens. `Panels`, of a type of weight:
///   kColumns                    of a panel, of 16 numbers each
///   kDepth                      columns of a line
///   decode(layout, tile, group, first, count, panel)
///                               puts `count` lines of a group of a tile there
///   multiply(block, count, panels, tiles, columns, sums)
///                               adds the products of `count` tokens and as many panels as tiles
///                               to sums, [token][tile][16]
/// `Tokens`:
///   kStrip                      how many make a strip
///   columns(group, begin, end)  how many columns it has for those of the lines of a group
///   together(tile)              how many tiles from this one on read the same of a token
///   block(tile, token, count, column)
///                               what Panels::multiply() reads from that token and column on
///   store(BlockSums)            adds the bias and rounds
template <typename Panels, typename Tokens>
class RowBlock {
 public:
  RowBlock(const PackedLayout& layout, const std::byte* weight, const Tokens& tokens,
           std::int64_t strip_tokens)
      : layout_(layout),
        weight_(weight),
        x_(tokens),
        panels_(kBlockTiles * kPanelFloats),
        sums_(strip_tokens * kBlockRows) {}

  void multiply(std::int64_t first_tile, std::int64_t tiles, std::int64_t first_token,
                std::int64_t tokens) {
    first_tile_ = first_tile, tiles_ = tiles;
    column_ = filled_ = 0;
    std::memset(sums_.data(), 0, tokens * tiles * PackedLayout::kTileRows * sizeof(float));
    for (std::int64_t g = 0; g < layout_.groups(); ++g) {
      const std::int64_t lines = layout_.group_lines(g);
      for (std::int64_t i = 0; i < lines;) {
        if (filled_ + kDepth > Panels::kColumns) multiply_panels(first_token, tokens);
        const std::int64_t count = std::min(lines - i, (Panels::kColumns - filled_) / kDepth);
        decode(g, i, count);
        filled_ += x_.columns(g, i * kDepth, (i + count) * kDepth);
        i += count;
      }
    }
    multiply_panels(first_token, tokens);
    x_.store({first_tile_, tiles_, first_token, tokens, sums_.data()});
  }

 private:
  static constexpr std::int64_t kDepth = Panels::kDepth;
  static constexpr std::int64_t kPanelFloats = Panels::kColumns * PackedLayout::kTileRows;

  // Lines [first, first + count) of a group of every tile.
  void decode(std::int64_t group, std::int64_t first, std::int64_t count) {
    for (std::int64_t i = 0; i < tiles_; ++i) {
      const std::byte* tile = weight_ + (first_tile_ + i) * layout_.tile_bytes();
      Panels::decode(layout_, tile, group, first, count,
                     panels_.data() + i * kPanelFloats + filled_ * PackedLayout::kTileRows);
    }
  }

  // sums += what is decoded, by tokens [first, first + count).
  void multiply_panels(std::int64_t first, std::int64_t count) {
    const Parts blocks(count, kBlockTokens);
    for (std::int64_t b = 0; b < blocks.parts; ++b) {
      const std::int64_t t = blocks.begin(b), size = blocks.begin(b + 1) - t;
      Panels::multiply(x_.block(first_tile_, first + t, size, column_), size, panels_.data(),
                       tiles_, filled_, sums_.data() + t * tiles_ * PackedLayout::kTileRows);
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
template <typename Panels, typename Tokens>
void multiply_rows(const PackedLayout& layout, const std::byte* weight, const Tokens& tokens,
                   std::int64_t count, const ParallelFor& parallel_for) {
  const Parts strips(count, Tokens::kStrip);
  const std::int64_t tiles = layout.tiles();
  parallel_for(strips.parts * tiles, [&](std::int64_t begin, std::int64_t end) {
    RowBlock<Panels, Tokens> rows(layout, weight, tokens, std::min(count, Tokens::kStrip));
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
