#pragma once

// Included by this folder's files only, below their target pragma.
//
// Few tokens: memory is the limit. Several tiles of the weight are read at once, in streams that
// are far from each other, and decoded a register at a time.

#include <algorithm>

#include "kernels/cpu/amx/tile_job.h"

namespace quantal::kernels {
namespace {

/// `tiles` tiles of the weight, `distance` from each other, by all tokens, of which there are
/// `token_tiles`.
template <typename Product, int parts, int token_tiles, int tiles, typename Source>
void multiply_streams(const TileJob& job, const Source& source, std::int64_t first,
                      std::int64_t distance) {
  constexpr std::int64_t kLines = Source::kTogether * kTileSteps / Source::Line::kSteps;
  const PackedLayout& layout = *job.layout;
  std::int64_t tile[tiles];
  for (int j = 0; j < tiles; ++j) tile[j] = source.tile(first + j * distance);
  alignas(64) std::byte steps[tiles * Source::kTogether * kTileBytes];
  alignas(64) float totals[token_tiles * tiles * kTileWords];
  alignas(64) float sums[token_tiles * tiles * kTileWords];
  for (std::int64_t block = 0; block < job.blocks(); ++block) {
    const std::int64_t group = block / job.blocks_per_group;
    const std::int64_t begin = block % job.blocks_per_group * job.block_lines;
    const std::int64_t end = std::min(layout.group_lines(group), begin + job.block_lines);
    for_tiles<token_tiles, tiles>(
        [](auto i, auto j) __attribute__((always_inline)) { zero_tile<i * tiles + j>(); });
    const std::int32_t* x = job.x + job.x_tiles.at(0, block, 0);
    for (std::int64_t line = begin; line < end; line += kLines) {
      const std::int64_t count = std::min(kLines, end - line);
      for (int j = 0; j < tiles; ++j) {
        decode(source, tile[j], group, line, count, steps + j * Source::kTogether * kTileBytes);
      }
      const std::int64_t step_tiles = tiles_for(count * Source::Line::kSteps);
      for (std::int64_t k = 0; k < step_tiles; ++k, x += kTileWords) {
        add_products<Product, parts, token_tiles, tiles>(job, x, steps + k * kTileBytes,
                                                         Source::kTogether * kTileBytes);
      }
    }
    for_tiles<token_tiles, tiles>([&](auto i, auto j) __attribute__((always_inline)) {
      store_tile<i * tiles + j>(totals + (i * tiles + j) * kTileWords, kLineBytes);
    });
    const bool is_last = block + 1 == job.blocks();
    for (int j = 0; j < tiles; ++j) {
      const TileScales scales = source.scales(tile[j], group);
      for (int i = 0; i < token_tiles; ++i) {
        const std::int64_t at = (i * tiles + j) * kTileWords;
        const TileSums of_tile{.token_tile = i,
                               .tile = tile[j],
                               .block = block,
                               .scales = &scales,
                               .totals = totals + at,
                               .before = block == 0 ? nullptr : sums + at};
        is_last ? finish_tiles<Product, 1>(job, {of_tile})
                : keep_tile<Product>(job, of_tile, sums + at);
      }
    }
  }
}

template <typename Product, int parts, int token_tiles, typename Source>
void few_tokens(const TileJob& job, const Source& source, const ParallelFor& parallel_for) {
  constexpr int kStreams = std::min(Source::kStreams, 4 / token_tiles);
  parallel_for(job.layout->tiles(), [&](std::int64_t begin, std::int64_t end) {
    const TileRegisters registers;
    const std::int64_t blocks = (end - begin) / kStreams;
    const std::int64_t distance = Source::kIsFar ? blocks : 1, next = Source::kIsFar ? 1 : kStreams;
    for (std::int64_t i = 0; i < blocks; ++i) {
      multiply_streams<Product, parts, token_tiles, kStreams>(job, source, begin + i * next,
                                                              distance);
    }
    for (std::int64_t i = begin + blocks * kStreams; i < end; ++i) {
      multiply_streams<Product, parts, token_tiles, 1>(job, source, i, 0);
    }
  });
}

}  // namespace
}  // namespace quantal::kernels
