#pragma once

// Included by this folder's files only, below their target pragma: products of int8 activations.

#include "kernels/cpu/amx/product.h"
#include "kernels/cpu/avx512/byte_lines.h"
#include "kernels/integer_linear.h"

namespace quantal::kernels {
namespace {

template <int bits>
struct ByteProduct : ByteSums<bits> {
  template <int sums, int x, int weight>
  static inline __attribute__((always_inline)) void add() {
    add_byte_products<sums, x, weight>();
  }
};

/// Codes of tokens [first, first + count) as tiles: what follows a group's last columns, and tokens
/// past the last, is anything, since it is multiplied by zeros or not stored.
template <int bits>
class CodeTiles {
 public:
  CodeTiles(const PackedLayout& layout, const TokenCodes& codes, std::int64_t first,
            std::int64_t count, const ParallelFor& parallel_for)
      : layout_(layout),
        blocks_per_group_(codes.blocks_per_group()),
        blocks_(layout.groups() * blocks_per_group_),
        tiles_(count, tiles_for(block_columns(0, 0) / 4), blocks_),
        x_(tiles_.size()),
        sums_(tiles_.sums_size()) {
    parallel_for(tiles_.count, [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t sum_begin = tiles_.sum_at(begin * kTileTokens, 0);
      const std::int64_t sum_end = tiles_.sum_at(end * kTileTokens, 0);
      std::fill(sums() + sum_begin, sums() + sum_end, 0);
      const std::int64_t token_end = std::min(count, end * kTileTokens);
      for (std::int64_t t = begin * kTileTokens; t < token_end; ++t)
        take_token(codes, first + t, t);
    });
  }
  const TokenTiles& tiles() const { return tiles_; }
  std::int32_t* data() const { return reinterpret_cast<std::int32_t*>(x_.data()); }
  std::int32_t* sums() const { return reinterpret_cast<std::int32_t*>(sums_.data()); }

 private:
  // Padded to whole lines.
  std::int64_t block_columns(std::int64_t group, std::int64_t block) const {
    const std::int64_t columns = layout_.group_lines(group) * layout_.depth();
    return std::clamp<std::int64_t>(columns - block * kBlockColumns, 0, kBlockColumns);
  }

  void take_token(const TokenCodes& codes, std::int64_t token, std::int64_t to) const {
    for (std::int64_t i = 0; i < blocks_; ++i) {
      sums()[tiles_.sum_at(to, i)] = ByteSums<bits>::x_sum(codes.sums(token)[i]);
      const std::int64_t group = i / blocks_per_group_, block = i % blocks_per_group_;
      const std::int64_t columns = block_columns(group, block);
      const std::int8_t* from =
          codes.codes(token) + layout_.padded_begin(group) + block * kBlockColumns;
      for (std::int64_t c = 0; c < columns; c += kLineBytes) {
        _mm512_storeu_si512(data() + tiles_.at(to, i, c / kLineBytes),
                            _mm512_loadu_si512(from + c));
      }
    }
  }

  const PackedLayout& layout_;
  std::int64_t blocks_per_group_, blocks_;
  TokenTiles tiles_;
  Scratch x_, sums_;
};

/// What find_integer_linear() gives, of a weight that is read from a Source of ByteLine<bits>.
template <typename Source, int bits>
void multiply_codes(const IntegerLinearArgs& args, const Source& source,
                    const ParallelFor& parallel_for) {
  const PackedLayout& layout = *args.layout;
  const TokenCodes codes(layout, args.source.tokens);
  parallel_for(codes.tokens(), [&](std::int64_t begin, std::int64_t end) {
    quantize_tokens__avx512(layout, args.source, begin, end, codes);
  });
  for_strips(codes.tokens(), [&](std::int64_t first, std::int64_t count) {
    const CodeTiles<bits> x(layout, codes, first, count, parallel_for);
    IntegerLinearArgs strip = args;
    strip.y = static_cast<std::byte*>(args.y) + first * args.y_stride * size_of(args.type);
    const TileJob job{.layout = &layout,
                      .tokens = count,
                      .x_tiles = x.tiles(),
                      .x = x.data(),
                      .x_sums = x.sums(),
                      .blocks_per_group = codes.blocks_per_group(),
                      .block_lines = kBlockColumns / layout.depth(),
                      .out = output_of(strip, &codes.scale(first))};
    multiply<ByteProduct<bits>, 1>(job, source, parallel_for);
  });
}

}  // namespace
}  // namespace quantal::kernels
