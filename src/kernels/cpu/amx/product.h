#pragma once

// Included by this folder's files only, below their target pragma.
//
// The loops of every linear of this folder. A line of the packed weight is one row of a tile as it
// lies (bytes), or several once it is decoded (bf16 pairs, codes of fewer bits): 16 rows of the
// weight, 4 bytes of each. So decoded lines are read as tiles, 16 steps each, and so are 16 tokens
// by 64 bytes of their rows. Four tiles of sums stay in registers.
//
// Few tokens: memory is the limit. Several tiles of the weight are read at once, in streams that
// are far from each other, and decoded a register at a time. Many tokens: some tiles by some
// columns are decoded into a panel that stays in the second-level cache, and every block of tokens
// is multiplied by all of it before the next one is made. Sums of a group are scaled while the
// next group is multiplied.
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
#include <cstring>

#include "kernels/cpu/amx/tiles.h"
#include "kernels/cpu/avx512/output.h"
#include "kernels/cpu/avx512/rows.h"
#include "kernels/scratch.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTileTokens = 16;
constexpr std::int64_t kTileSteps = 16;
constexpr std::int64_t kTileWords = kTileRows * kTileSteps;
constexpr std::int64_t kTileBytes = kTileWords * 4;
constexpr std::int64_t kBlockTokens = 2 * kTileTokens;
constexpr std::int64_t kPanelTiles = 16;  ///< at most
constexpr std::int64_t kPanelSteps = 512;
constexpr std::int64_t kPanelWords = kPanelSteps * kTileRows;
constexpr std::int64_t kMostStripTokens = 512;  ///< that are multiplied at once
constexpr int kMostSpans = 16;

/// Tiles of 16 that `count` tokens or steps take.
constexpr std::int64_t tiles_for(std::int64_t count) {
  return (count + kTileSteps - 1) / kTileSteps;
}

/// Tiles of the weight in a panel. Many tokens do not stay in the second-level cache: the more
/// tiles, the less often are they read.
constexpr std::int64_t panel_tiles(std::int64_t tokens) { return tokens <= 256 ? 8 : kPanelTiles; }

/// Calls body(first, count) for tokens [0, tokens) in parts of about the same size.
template <typename Body>
void for_strips(std::int64_t tokens, const Body& body) {
  const std::int64_t strips = (tokens + kMostStripTokens - 1) / kMostStripTokens;
  for (std::int64_t i = 0; i < strips; ++i) {
    const std::int64_t first = tokens * i / strips;
    body(first, tokens * (i + 1) / strips - first);
  }
}

/// Where the tokens of a call lie: tiles of 16 tokens by 16 words of 4 bytes. Every block of a
/// group begins a tile.
struct TokenTiles {
  TokenTiles(std::int64_t tokens, std::int64_t tiles_of_block, std::int64_t blocks)
      : count(tiles_for(tokens)), block_tiles(tiles_of_block), row_tiles(block_tiles * blocks) {}

  std::int64_t size() const { return count * row_tiles * kTileWords; }
  /// Words [16 tile, 16 tile + 16) of a token, from the beginning of a block.
  std::int64_t at(std::int64_t token, std::int64_t block, std::int64_t tile) const {
    return (token / kTileTokens * row_tiles + block * block_tiles + tile) * kTileWords +
           token % kTileTokens * kTileSteps;
  }

  std::int64_t count;  ///< of 16 tokens
  std::int64_t block_tiles;
  std::int64_t row_tiles;  ///< of 16 tokens
};

/// What is multiplied: tokens in `parts` whose sum they are, one after the other.
struct TileJob {
  const PackedLayout* layout;
  std::int64_t tokens;
  TokenTiles x_tiles;
  const std::int32_t* x;
  /// Σ x of each block of each group, [token][block], fp32 or int32 as the Product has it, with
  /// memory for whole tiles of tokens; null where the Product has no use for them.
  const std::int32_t* x_sums;
  std::int64_t blocks_per_group;
  std::int64_t block_lines;
  Output out;

  std::int64_t blocks() const { return layout->groups() * blocks_per_group; }
};

// Tiles: 4 of sums, 2 of tokens, 2 of the weight.
constexpr int kXTile = 4, kWeightTile = 6;

/// sums[token][row] of a tile += what `totals`, of a block, are once they are scaled.
template <typename Product>
inline void apply_tile(const TileJob& job, std::int64_t first_token, std::int64_t block,
                       const TileScales& scales, const float* totals, float* sums) {
  const auto x_sums = [&](std::int64_t t) {
    const std::int64_t token = first_token + t;
    return job.x_sums == nullptr ? nullptr : job.x_sums + token * job.blocks() + block;
  };
  QUANTAL_UNROLL for (int t = 0; t < kTileTokens; ++t) {
    const __m512 before = _mm512_loadu_ps(sums + t * kTileRows);
    const auto total = Product::load(totals + t * kTileRows);
    _mm512_storeu_ps(sums + t * kTileRows, Product::apply(before, total, scales, x_sums(t), 0));
  }
}

// Calls body(i, j) for `rows` by `columns` tiles.
template <int rows, int columns, typename Body>
inline __attribute__((always_inline)) void for_tiles(const Body& body) {
  for_steps<rows>([&](auto i) __attribute__((always_inline)) {
    for_steps<columns>([&](auto j) __attribute__((always_inline)) { body(i, j); });
  });
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
/// each other, by `token_tiles` of tokens.
template <typename Product, int parts, int token_tiles, int tiles>
inline __attribute__((always_inline)) void add_products(const TileJob& job, const std::int32_t* x,
                                                        const std::byte* steps,
                                                        std::int64_t stride) {
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
        Product::template add<i * tiles + j, kXTile + i, kWeightTile + j % 2>();
      });
    });
  });
}

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
  alignas(64) float sums[token_tiles * tiles * kTileWords] = {};
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
    for (int j = 0; j < tiles; ++j) {
      const TileScales scales = source.scales(tile[j], group);
      for (int i = 0; i < token_tiles; ++i) {
        const std::int64_t at = (i * tiles + j) * kTileWords;
        apply_tile<Product>(job, i * kTileTokens, block, scales, totals + at, sums + at);
      }
    }
  }
  for (std::int64_t t = 0; t < job.tokens; ++t) {
    const float* token_sums =
        sums + t / kTileTokens * tiles * kTileWords + t % kTileTokens * kTileRows;
    for (int j = 0; j < tiles; ++j) {
      store_rows(job.out, tile[j], t, _mm512_loadu_ps(token_sums + j * kTileWords));
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

/// A part of a block of a group that is in the panel.
struct Span {
  std::int64_t block;  ///< of a token's x_sums
  std::int64_t tile;   ///< of its block, where it begins
  std::int64_t step;   ///< of the panel, too
  std::int64_t tiles;  ///< of kTileSteps; zeros fill the last one
  bool is_first;       ///< of its block
  bool is_last;
};

/// The panel and the results of all tokens by its tiles, [token tile][tile][token][row].
struct Work {
  const Span* spans;
  int count;
  const std::byte* panels;    ///< kPanelWords words a tile
  const TileScales* scales;   ///< [span][tile]
  const std::int64_t* tiles;  ///< of the result
  bool is_first;              ///< panel of the rows; the sums are in memory between panels only
  bool is_last;
  float* totals;  ///< of a block that is longer than a panel
  float* sums;

  static std::int64_t at(std::int64_t token_tile, std::int64_t tile) {
    return (token_tile * kPanelTiles + tile) * kTileWords;
  }
};

/// Up to 2 tiles of tokens by up to 2 of the weight. Products are a Product's, of tokens in
/// `parts`.
template <typename Product, int parts, int token_tiles, int tiles>
class PanelBlock {
 public:
  static void multiply(const TileJob& job, const Work& work, std::int64_t token_tile,
                       std::int64_t first_tile) {
    PanelBlock block(job, work, token_tile, first_tile);
    block.begin();
    for (int s = 0; s < work.count; ++s) block.add(s);
    block.apply(kSums);
    block.end();
  }

 private:
  static constexpr int kSums = token_tiles * tiles;

  PanelBlock(const TileJob& job, const Work& work, std::int64_t token_tile, std::int64_t first_tile)
      : job_(job), work_(work), token_tile_(token_tile), tile_(first_tile) {}

  void begin() {
    for (int i = 0; i < kSums; ++i) {
      float* sums = sums_ + i * kTileWords;
      if (work_.is_first) {
        std::memset(sums, 0, kTileBytes);
      } else {
        std::memcpy(sums, work_.sums + at(i / tiles, i % tiles), kTileBytes);
      }
    }
  }

  void end() const {
    for (int i = 0; i < kSums; ++i) {
      const float* sums = sums_ + i * kTileWords;
      if (work_.is_last) {
        store(i / tiles, i % tiles, sums);
      } else {
        std::memcpy(work_.sums + at(i / tiles, i % tiles), sums, kTileBytes);
      }
    }
  }

  void store(int i, int j, const float* sums) const {
    const std::int64_t first = (token_tile_ + i) * kTileTokens;
    const std::int64_t count = std::min(kTileTokens, job_.tokens - first);
    for (std::int64_t t = 0; t < count; ++t) {
      store_rows(job_.out, work_.tiles[tile_ + j], first + t,
                 _mm512_loadu_ps(sums + t * kTileRows));
    }
  }

  inline __attribute__((always_inline)) void add(int index) {
    const Span& span = work_.spans[index];
    for_tiles<token_tiles, tiles>([&](auto i, auto j) __attribute__((always_inline)) {
      if (span.is_first) {
        zero_tile<i * tiles + j>();
      } else {
        load_tile<i * tiles + j>(work_.totals + at(i, j), kLineBytes);
      }
    });
    const std::int32_t* x =
        job_.x + job_.x_tiles.at(token_tile_ * kTileTokens, span.block, span.tile);
    const std::byte* weight = work_.panels + (tile_ * kPanelSteps + span.step) * kLineBytes;
    for (std::int64_t k = 0; k < span.tiles; ++k) {
      add_products<Product, parts, token_tiles, tiles>(
          job_, x + k * kTileWords, weight + k * kTileBytes, kPanelSteps * kLineBytes);
      // Meanwhile, what was there before is scaled.
      if (applied_ < kSums) apply(static_cast<int>(kSums * (k + 1) / span.tiles));
    }
    apply(kSums);
    if (span.is_last) span_ = index, applied_ = 0, half_ = 1 - half_;
    for_tiles<token_tiles, tiles>([&](auto i, auto j) __attribute__((always_inline)) {
      store_tile<i * tiles + j>(
          span.is_last ? totals_[half_] + (i * tiles + j) * kTileWords : work_.totals + at(i, j),
          kLineBytes);
    });
  }

  // Scales tiles of sums of the last whole block, until `end` of them are.
  inline __attribute__((always_inline)) void apply(int end) {
    for (; applied_ < end; ++applied_) {
      const int i = applied_ / tiles, j = applied_ % tiles;
      apply_tile<Product>(job_, (token_tile_ + i) * kTileTokens, work_.spans[span_].block,
                          work_.scales[span_ * kPanelTiles + tile_ + j],
                          totals_[half_] + applied_ * kTileWords, sums_ + applied_ * kTileWords);
    }
  }

  std::int64_t at(int i, int j) const { return Work::at(token_tile_ + i, tile_ + j); }

  const TileJob& job_;
  const Work& work_;
  std::int64_t token_tile_, tile_;
  int span_ = 0;         ///< whose sums totals_[half_] has
  int applied_ = kSums;  ///< tiles of them that are scaled
  int half_ = 0;
  alignas(64) float totals_[2][kSums * kTileWords];
  alignas(64) float sums_[kSums * kTileWords];
};

/// Some tiles of the weight by all tokens.
template <typename Product, int parts, typename Source>
class RowBlock {
 public:
  RowBlock(const TileJob& job, const Source& source)
      : job_(job),
        source_(source),
        panels_(panel_tiles(job.tokens) * kPanelWords),
        scales_(kMostSpans * kPanelTiles * static_cast<std::int64_t>(sizeof(TileScales)) / 4),
        totals_(between_panels(job)),
        sums_(between_panels(job)) {}

  void multiply(std::int64_t first_tile, std::int64_t tiles) {
    tiles_ = tiles;
    const PackedLayout& layout = *job_.layout;
    for (std::int64_t i = 0; i < tiles; ++i) result_tiles_[i] = source_.tile(first_tile + i);
    filled_ = count_ = 0;
    is_first_ = true;
    for (std::int64_t g = 0; g < layout.groups(); ++g) {
      const std::int64_t lines = layout.group_lines(g);
      for (std::int64_t b = 0; b < job_.blocks_per_group; ++b) {
        const std::int64_t end = std::min(lines, (b + 1) * job_.block_lines);
        add_block(g, b, std::min(lines, b * job_.block_lines), end);
      }
    }
    multiply_panel(true);
  }

 private:
  static constexpr std::int64_t kSteps = Source::Line::kSteps;

  // Numbers that are in memory between panels: none of rows that a panel has room for.
  static std::int64_t between_panels(const TileJob& job) {
    const bool is_one =
        job.x_tiles.row_tiles * kTileSteps <= kPanelSteps && job.blocks() <= kMostSpans;
    return is_one ? 0 : job.x_tiles.count * kPanelTiles * kTileWords;
  }

  // Lines [begin, end) of a group, of every tile. An empty block still has its term.
  void add_block(std::int64_t group, std::int64_t block, std::int64_t begin, std::int64_t end) {
    const std::int64_t steps = (end - begin) * kSteps;
    if (filled_ + std::min(steps, kPanelSteps) > kPanelSteps) multiply_panel(false);
    std::int64_t i = begin;
    do {
      if (filled_ == kPanelSteps || count_ == kMostSpans) multiply_panel(false);
      const std::int64_t count = std::min(end - i, (kPanelSteps - filled_) / kSteps);
      const std::int64_t tiles = tiles_for(count * kSteps);
      spans_[count_] = {.block = group * job_.blocks_per_group + block,
                        .tile = (i - begin) * kSteps / kTileSteps,
                        .step = filled_,
                        .tiles = tiles,
                        .is_first = i == begin,
                        .is_last = i + count == end};
      for (std::int64_t t = 0; t < tiles_; ++t) decode_lines(t, group, i, count);
      i += count, filled_ += tiles * kTileSteps, ++count_;
    } while (i < end);
  }

  void decode_lines(std::int64_t index, std::int64_t group, std::int64_t first,
                    std::int64_t count) {
    const std::int64_t tile = result_tiles_[index];
    scales()[count_ * kPanelTiles + index] = source_.scales(tile, group);
    decode(source_, tile, group, first, count,
           panels() + (index * kPanelSteps + filled_) * kLineBytes);
  }

  // By all tokens.
  void multiply_panel(bool is_last) {
    const Work work{.spans = spans_,
                    .count = count_,
                    .panels = panels(),
                    .scales = scales(),
                    .tiles = result_tiles_,
                    .is_first = is_first_,
                    .is_last = is_last,
                    .totals = totals_.data(),
                    .sums = sums_.data()};
    for (std::int64_t t = 0; t < job_.tokens; t += kBlockTokens) {
      const bool is_wide = job_.tokens - t > kTileTokens;
      for (std::int64_t i = 0; i < tiles_; i += 2) {
        const auto multiply = kMultiply[is_wide][tiles_ - i > 1];
        multiply(job_, work, t / kTileTokens, i);
      }
    }
    filled_ = count_ = 0;
    is_first_ = false;
  }

  static constexpr decltype(&PanelBlock<Product, parts, 1, 1>::multiply) kMultiply[2][2] = {
      {PanelBlock<Product, parts, 1, 1>::multiply, PanelBlock<Product, parts, 1, 2>::multiply},
      {PanelBlock<Product, parts, 2, 1>::multiply, PanelBlock<Product, parts, 2, 2>::multiply}};

  std::byte* panels() const { return reinterpret_cast<std::byte*>(panels_.data()); }
  TileScales* scales() const { return reinterpret_cast<TileScales*>(scales_.data()); }

  const TileJob& job_;
  const Source& source_;
  Scratch panels_, scales_, totals_, sums_;
  Span spans_[kMostSpans];
  std::int64_t tiles_ = 0;
  std::int64_t result_tiles_[kPanelTiles]{};
  bool is_first_ = true;
  std::int64_t filled_ = 0;  ///< steps in the panel
  int count_ = 0;            ///< spans in the panel
};

template <typename Product, int parts, typename Source>
void many_tokens(const TileJob& job, const Source& source, const ParallelFor& parallel_for) {
  parallel_for(job.layout->tiles(), [&](std::int64_t begin, std::int64_t end) {
    const TileRegisters registers;
    RowBlock<Product, parts, Source> rows(job, source);
    for (std::int64_t i = begin; i < end; i += panel_tiles(job.tokens)) {
      rows.multiply(i, std::min(panel_tiles(job.tokens), end - i));
    }
  });
}

/// At most kMostStripTokens.
template <typename Product, int parts, typename Source>
void multiply(const TileJob& job, const Source& source, const ParallelFor& parallel_for) {
  if (job.tokens <= kTileTokens) return few_tokens<Product, parts, 1>(job, source, parallel_for);
  if (job.tokens <= 2 * kTileTokens) {
    return few_tokens<Product, parts, 2>(job, source, parallel_for);
  }
  many_tokens<Product, parts>(job, source, parallel_for);
}

}  // namespace
}  // namespace quantal::kernels
