#pragma once

// Included by kernels' files only, below their target pragma: the loops of a convolution by taps.
//
// A Product multiplies tokens by tiles of rows that decode() took apart:
//   kTokens              at most, at once
//   Registers            is there meanwhile
//   multiply<tiles>(block, token, count, totals)
//                        sums of tokens [token, token + count) of a block: [token][tile][row]
// A Store<type> of a block and a tile scales such sums of a token, adds the bias and rounds:
//   store(position, totals)

#include <algorithm>
#include <array>

#include "kernels/tap_conv.h"

namespace quantal::kernels {
namespace {

/// The Product of a TileProduct, which takes one tile of rows at a time, by 3 or 6 tokens:
///   Code                 of x
///   panel_bytes(plan)    of a tile
///   multiply<tokens, total_stride>(plan, x, stride, panel, totals)
template <typename TileProduct>
struct EachTile {
  static constexpr std::int64_t kTokens = 6;
  struct Registers {};

  template <int tiles>
  static void multiply(const TapBlock& block, std::int64_t token, std::int64_t count,
                       std::int32_t* totals) {
    constexpr std::int64_t kStride = tiles * PackedLayout::kTileRows;
    const TapPlan& plan = block.plan;
    const std::int64_t stride = plan.token_bytes();
    const auto* x = static_cast<const typename TileProduct::Code*>(block.x) + token * stride;
    for (int j = 0; j < tiles; ++j) {
      const std::byte* panel = block.panel + j * TileProduct::panel_bytes(plan);
      std::int32_t* to = totals + j * PackedLayout::kTileRows;
      if (count <= 3) {
        TileProduct::template multiply<3, kStride>(plan, x, stride, panel, to);
      } else {
        TileProduct::template multiply<6, kStride>(plan, x, stride, panel, to);
      }
    }
  }
};

/// Sums of tokens one after the other, of which those that are positions go to y.
template <typename Store, int tiles>
class Positions {
 public:
  explicit Positions(const TapBlock& block)
      : stores_{Store(block, 0), Store(block, tiles - 1)},
        pitch_(block.plan.pitch()),
        width_(block.plan.width()),
        column_(block.first % pitch_) {}

  void store(std::int64_t count, const std::int32_t* totals) {
    constexpr std::int64_t kTileRows = PackedLayout::kTileRows;
    for (std::int64_t t = 0; t < count; ++t, totals += tiles * kTileRows) {
      if (column_ < width_) {
        for (int j = 0; j < tiles; ++j) stores_[j].store(position_, totals + j * kTileRows);
        ++position_;
      }
      if (++column_ == pitch_) column_ = 0;
    }
  }

 private:
  std::array<Store, 2> stores_;
  std::int64_t pitch_, width_;
  std::int64_t column_, position_ = 0;
};

template <typename Product, typename Store, int tiles>
void multiply_tokens(const TapBlock& block) {
  [[maybe_unused]] const typename Product::Registers registers;
  Positions<Store, tiles> positions(block);
  // Sums are stored while the next ones are computed: tiles take a while to get to memory.
  alignas(64) std::int32_t totals[2][Product::kTokens * tiles * PackedLayout::kTileRows];
  std::int64_t before = 0;
  int which = 0;
  for (std::int64_t token = 0; token < block.count; token += Product::kTokens, which ^= 1) {
    const std::int64_t count = std::min<std::int64_t>(Product::kTokens, block.count - token);
    Product::template multiply<tiles>(block, token, count, totals[which]);
    positions.store(before, totals[which ^ 1]);
    before = count;
  }
  positions.store(before, totals[which ^ 1]);
}

template <typename Product, typename Store>
void multiply_tiles(const TapBlock& block) {
  if (block.tiles == 1) return multiply_tokens<Product, Store, 1>(block);
  multiply_tokens<Product, Store, 2>(block);
}

template <typename Product, template <FloatType> typename Store>
void multiply_block(const TapBlock& block) {
  switch (block.type) {
    case FloatType::kF32:
      return multiply_tiles<Product, Store<FloatType::kF32>>(block);
    case FloatType::kBF16:
      return multiply_tiles<Product, Store<FloatType::kBF16>>(block);
    case FloatType::kF16:
      return multiply_tiles<Product, Store<FloatType::kF16>>(block);
  }
}

}  // namespace
}  // namespace quantal::kernels
