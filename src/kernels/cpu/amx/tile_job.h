#pragma once

// Included by this folder's files only, below their target pragma: what is multiplied, a tile at a
// time.
//
// A line of the packed weight is one row of a tile as it lies (bytes), or several once it is
// decoded (bf16 pairs, codes of fewer bits): 16 rows of the weight, 4 bytes of each. So decoded
// lines are read as tiles, 16 steps each, and so are 16 tokens by 64 bytes of their rows. Four
// tiles of sums stay in registers.
//
// A Source is where a weight lies:
//   Line, of which the packed weight has lines, and whose steps are in a tile
//   kStreams             tiles that are read at once
//   kIsFar               whether they are far from each other, or neighbours
//   kTogether            tiles of steps of each that are
//   tile(index)          the tile of the result, in the order in which they are read
//   decode(tile, group, first, count, steps)
//                        takes `count` lines of a group of a tile apart into steps
//   scales(tile, group)

#include <algorithm>
#include <array>
#include <type_traits>

#include "kernels/cpu/amx/tiles.h"
#include "kernels/cpu/avx512/output.h"
#include "kernels/cpu/avx512/rows.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTileTokens = 16;
constexpr std::int64_t kTileSteps = 16;
constexpr std::int64_t kTileWords = kTileRows * kTileSteps;
constexpr std::int64_t kTileBytes = kTileWords * 4;

/// Tiles of 16 that `count` tokens or steps take.
constexpr std::int64_t tiles_for(std::int64_t count) {
  return (count + kTileSteps - 1) / kTileSteps;
}

/// Where the tokens of a call lie: tiles of 16 tokens by 16 words of 4 bytes. Every block of a
/// group begins a tile.
struct TokenTiles {
  TokenTiles(std::int64_t tokens, std::int64_t tiles_of_block, std::int64_t block_count)
      : count(tiles_for(tokens)),
        blocks(block_count),
        block_tiles(tiles_of_block),
        row_tiles(block_tiles * blocks) {}

  std::int64_t size() const { return count * row_tiles * kTileWords; }
  /// Words [16 tile, 16 tile + 16) of a token, from the beginning of a block.
  std::int64_t at(std::int64_t token, std::int64_t block, std::int64_t tile) const {
    return (token / kTileTokens * row_tiles + block * block_tiles + tile) * kTileWords +
           token % kTileTokens * kTileSteps;
  }
  /// Of one number for each block of each token.
  std::int64_t sums_size() const { return count * blocks * kTileTokens; }
  std::int64_t sum_at(std::int64_t token, std::int64_t block) const {
    return (token / kTileTokens * blocks + block) * kTileTokens + token % kTileTokens;
  }

  std::int64_t count;  ///< of 16 tokens
  std::int64_t blocks;
  std::int64_t block_tiles;
  std::int64_t row_tiles;  ///< of 16 tokens
};

/// What is multiplied: tokens in `parts` whose sum they are, one after the other.
struct TileJob {
  const PackedLayout* layout;
  std::int64_t tokens;
  TokenTiles x_tiles;
  const std::int32_t* x;
  /// Σ x of each block, where x_tiles.sum_at() says, fp32 or int32 as the Product has it; null
  /// where the Product has no use for them.
  const std::int32_t* x_sums;
  std::int64_t blocks_per_group;
  std::int64_t block_lines;
  Output out;

  std::int64_t blocks() const { return x_tiles.blocks; }
};

// Tiles: 4 of sums, 2 of tokens, 2 of the weight.
constexpr int kXTile = 4, kWeightTile = 6;

// Calls body(i, j) for `rows` by `columns` tiles.
template <int rows, int columns, typename Body>
inline __attribute__((always_inline)) void for_tiles(const Body& body) {
  for_steps<rows>([&](auto i) __attribute__((always_inline)) {
    for_steps<columns>([&](auto j) __attribute__((always_inline)) { body(i, j); });
  });
}

/// A Line that scales what it takes apart: sums of its products are those of whole rows.
template <typename Line>
constexpr bool kIsScaled = std::is_constructible_v<Line, const TileScales&>;

template <typename Source>
inline typename Source::Line line_of(const Source& source, std::int64_t tile, std::int64_t group) {
  if constexpr (kIsScaled<typename Source::Line>) {
    return typename Source::Line(source.scales(tile, group));
  } else {
    return typename Source::Line();
  }
}

/// Lines [first, first + count) of a group of a tile as steps of whole tiles.
template <typename Source>
inline void decode(const Source& source, std::int64_t tile, std::int64_t group, std::int64_t first,
                   std::int64_t count, std::byte* steps) {
  source.decode(tile, group, first, count, steps);
  for (std::int64_t step = count * Source::Line::kSteps; step % kTileSteps != 0; ++step) {
    _mm512_storeu_si512(steps + step * kLineBytes, _mm512_setzero_si512());
  }
}

/// Sums += products of a tile of steps of each of `tiles` tiles of the weight, `stride` bytes from
/// each other, by `token_tiles` of tokens. prepare(i) comes before the first product of sum i.
template <typename Product, int parts, int token_tiles, int tiles, typename Prepare>
inline __attribute__((always_inline)) void add_products(const TileJob& job, const std::int32_t* x,
                                                        const std::byte* steps, std::int64_t stride,
                                                        const Prepare& prepare) {
  const auto load_weight = [&](auto j) __attribute__((always_inline)) {
    load_tile<kWeightTile + j % 2>(steps + j * stride, kLineBytes);
  };
  // Two stay for all parts.
  if constexpr (tiles <= 2) for_steps<tiles>(load_weight);
  for_steps<parts>([&](auto part) __attribute__((always_inline)) {
    for_steps<token_tiles>([&](auto i) __attribute__((always_inline)) {
      load_tile<kXTile + i>(x + part * job.x_tiles.size() + i * job.x_tiles.row_tiles * kTileWords,
                            kLineBytes);
    });
    for_steps<tiles>([&](auto j) __attribute__((always_inline)) {
      if constexpr (tiles > 2) load_weight(j);
      for_steps<token_tiles>([&](auto i) __attribute__((always_inline)) {
        constexpr int kSum = i * tiles + j;
        if constexpr (part == 0) prepare(std::integral_constant<int, kSum>());
        Product::template add<kSum, kXTile + i, kWeightTile + j % 2>();
      });
    });
  });
}

template <typename Product, int parts, int token_tiles, int tiles>
inline __attribute__((always_inline)) void add_products(const TileJob& job, const std::int32_t* x,
                                                        const std::byte* steps,
                                                        std::int64_t stride) {
  add_products<Product, parts, token_tiles, tiles>(job, x, steps, stride,
                                                   [](auto) __attribute__((always_inline)) {});
}

/// Sums of 16 tokens by 16 rows of a block of a group, and where they belong.
struct TileSums {
  std::int64_t token_tile;
  std::int64_t tile;  ///< of the result
  std::int64_t block;
  const TileScales* scales;
  const float* totals;  ///< fp32 or int32, as the Product has it
  const float* before;  ///< sums of the blocks before; null of the first
};

/// Scales them. A copy of all that is the same for every token: what stands in memory would be read
/// anew after every store.
template <typename Product>
class Scaling {
 public:
  Scaling(const TileJob& job, const TileSums& sums)
      : totals_(sums.totals),
        before_(sums.before),
        x_sums_(job.x_sums == nullptr
                    ? nullptr
                    : job.x_sums + job.x_tiles.sum_at(sums.token_tile * kTileTokens, sums.block)),
        scales_(*sums.scales) {}

  /// The t-th token's, added to those before.
  template <bool is_first>
  inline __attribute__((always_inline)) __m512 get(std::int64_t t) const {
    const __m512 before = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(before_ + t * kTileRows);
    const auto total = Product::load(totals_ + t * kTileRows);
    return Product::apply(before, total, scales_, x_sums_, static_cast<int>(t));
  }

 private:
  const float* totals_;
  const float* before_;
  const std::int32_t* x_sums_;
  TileScales scales_;
};

template <typename Product, bool is_first>
void keep_tile(const TileJob& job, const TileSums& sums, float* after) {
  const Scaling<Product> scaling(job, sums);
  QUANTAL_UNROLL for (int t = 0; t < kTileTokens; ++t) {
    _mm512_storeu_ps(after + t * kTileRows, scaling.template get<is_first>(t));
  }
}

/// Of a block that is not the last one: to `after`.
template <typename Product>
void keep_tile(const TileJob& job, const TileSums& sums, float* after) {
  const auto keep = sums.before == nullptr ? keep_tile<Product, true> : keep_tile<Product, false>;
  keep(job, sums, after);
}

template <typename Product, int tiles, FloatType type, bool is_first>
void finish_tiles(const TileJob& job, const std::array<TileSums, tiles>& sums) {
  const std::int64_t first = sums[0].token_tile * kTileTokens;
  const std::int64_t count = std::min(kTileTokens, job.tokens - first);
  const RowStore<type> rows(job.out, sums[0].tile), last_rows(job.out, sums[tiles - 1].tile);
  const Scaling<Product> scaling(job, sums[0]), last_scaling(job, sums[tiles - 1]);
  for (std::int64_t t = 0; t < count; ++t) {
    const __m512 sum = scaling.template get<is_first>(t);
    if constexpr (tiles == 1) {
      rows.store(first + t, sum);
    } else {
      store_both(rows, last_rows, first + t, sum, last_scaling.template get<is_first>(t));
    }
  }
}

template <typename Product, int tiles, FloatType type>
void finish_tiles(const TileJob& job, const std::array<TileSums, tiles>& sums) {
  const auto finish = sums[0].before == nullptr ? finish_tiles<Product, tiles, type, true>
                                                : finish_tiles<Product, tiles, type, false>;
  finish(job, sums);
}

/// Of the last block, of tiles of the same tokens: to the result.
template <typename Product, int tiles>
void finish_tiles(const TileJob& job, const std::array<TileSums, tiles>& sums) {
  switch (job.out.type) {
    case FloatType::kF32:
      return finish_tiles<Product, tiles, FloatType::kF32>(job, sums);
    case FloatType::kBF16:
      return finish_tiles<Product, tiles, FloatType::kBF16>(job, sums);
    case FloatType::kF16:
      return finish_tiles<Product, tiles, FloatType::kF16>(job, sums);
  }
}

}  // namespace
}  // namespace quantal::kernels
