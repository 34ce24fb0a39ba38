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

template <typename Product, typename Store, int tiles>
void multiply_tokens(const TapBlock& block) {
  constexpr std::int64_t kTileRows = PackedLayout::kTileRows;
  [[maybe_unused]] const typename Product::Registers registers;
  const std::array<Store, 2> stores{Store(block, 0), Store(block, tiles - 1)};
  const std::int64_t pitch = block.plan.pitch(), width = block.plan.width();
  std::int64_t column = block.first % pitch, position = 0;
  alignas(64) std::int32_t totals[Product::kTokens * tiles * kTileRows];
  for (std::int64_t token = 0; token < block.count; token += Product::kTokens) {
    const std::int64_t count = std::min<std::int64_t>(Product::kTokens, block.count - token);
    Product::template multiply<tiles>(block, token, count, totals);
    for (std::int64_t t = 0; t < count; ++t) {
      if (column < width) {
        for (int j = 0; j < tiles; ++j) {
          stores[j].store(position, totals + (t * tiles + j) * kTileRows);
        }
        ++position;
      }
      if (++column == pitch) column = 0;
    }
  }
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
