#pragma once

// Included by this folder's files only, below their target pragma.
//
// Many tokens: some tiles by some columns are decoded into a panel that stays in the second-level
// cache, and every block of tokens is multiplied by all of it before the next one is made. While
// tiles multiply, what they made before is scaled, added up and stored.

#include <algorithm>

#include "kernels/cpu/amx/tile_job.h"
#include "kernels/scratch.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kPanelTiles = 16;  ///< at most
constexpr std::int64_t kPanelSteps = 512;
constexpr std::int64_t kPanelWords = kPanelSteps * kTileRows;
constexpr int kMostSpans = 16;

/// Of `tiles` tiles of the weight, those in a panel: parts of about the same size, of pairs. Many
/// tokens do not stay in the second-level cache: the more tiles, the less often are they read.
constexpr std::int64_t panel_tiles(std::int64_t tokens, std::int64_t tiles) {
  const std::int64_t most = tokens <= 256 ? 8 : kPanelTiles;
  const std::int64_t panels = (tiles + most - 1) / most;
  return (tiles + 2 * panels - 1) / (2 * panels) * 2;
}

/// A part of a block of a group that is in the panel.
struct Span {
  std::int64_t block;
  std::int64_t tile;   ///< of its block, where it begins
  std::int64_t step;   ///< of the panel, too
  std::int64_t tiles;  ///< of kTileSteps; zeros fill the last one
  bool is_first;       ///< of its block
  bool is_last;
};

/// The panel, and what stays of the results of some tokens by its tiles until the next one.
struct Work {
  std::int64_t first_token_tile;
  const Span* spans;
  int count;
  const std::byte* panels;    ///< kPanelWords words a tile
  const TileScales* scales;   ///< [span][tile]
  const std::int64_t* tiles;  ///< of the result
  // [token tile][tile][token][row]
  float* totals;  ///< of the block that the panel does not have the end of
  float* sums;    ///< of the blocks before

  float* kept_totals(std::int64_t token_tile, std::int64_t tile) const {
    return totals + at(token_tile, tile);
  }
  float* kept_sums(std::int64_t token_tile, std::int64_t tile) const {
    return sums + at(token_tile, tile);
  }
  std::int64_t at(std::int64_t token_tile, std::int64_t tile) const {
    return ((token_tile - first_token_tile) * kPanelTiles + tile) * kTileWords;
  }
};

/// What was multiplied last: sums of a part of a block of a group, up to 2 tiles of tokens by 2 of
/// the weight. Instructions for tiles wait for each other in order: each is stored just before the
/// next product needs its register, and scaled while those after that are multiplied.
template <typename Product>
class Results {
 public:
  Results(const TileJob& job, const Work& work) : job_(job), work_(work) {}

  /// Registers [0, token_tiles · tiles) have the sums of a span of the panel.
  template <int token_tiles, int tiles>
  void begin(int span, std::int64_t token_tile, std::int64_t tile) {
    span_ = &work_.spans[span], token_tile_ = token_tile, tile_ = tile, tiles_ = tiles;
    held_ = token_tiles * tiles;
    for (int i = 0; i < held_; ++i) {
      to_[i] = span_->is_last ? totals_ + i * kTileWords
                              : work_.kept_totals(token_tile + i / tiles, tile + i % tiles);
    }
    left_ = span_->is_last ? token_tiles : 0;
  }

  template <int tile>
  inline __attribute__((always_inline)) void store() const {
    if (tile < held_) store_tile<tile>(to_[tile], kLineBytes);
  }

  /// Those of 16 tokens, after all are stored.
  void scale_some() {
    if (left_ > 0) scale(--left_);
  }
  void scale_all() {
    while (left_ > 0) scale_some();
  }
  void finish() {
    for_steps<4>([&](auto i) __attribute__((always_inline)) { store<i>(); });
    scale_all();
  }

 private:
  void scale(int token_tile) {
    if (span_->block + 1 < job_.blocks()) {
      for (int j = 0; j < tiles_; ++j) {
        keep_tile<Product>(job_, sums(token_tile, j), kept(token_tile, j));
      }
    } else if (tiles_ == 2) {
      finish_tiles<Product, 2>(job_, {sums(token_tile, 0), sums(token_tile, 1)});
    } else {
      finish_tiles<Product, 1>(job_, {sums(token_tile, 0)});
    }
  }

  TileSums sums(int i, int j) {
    const std::int64_t at = span_ - work_.spans;
    return {.token_tile = token_tile_ + i,
            .tile = work_.tiles[tile_ + j],
            .block = span_->block,
            .scales = &work_.scales[at * kPanelTiles + tile_ + j],
            .totals = totals_ + (i * tiles_ + j) * kTileWords,
            .before = span_->block == 0 ? nullptr
                      : at == 0         ? between(i, j)
                                        : here(i, j)};
  }

  // Where the sums go, before the last block.
  float* kept(int i, int j) {
    const bool is_last = span_ + 1 == work_.spans + work_.count || !span_[1].is_last;
    return is_last ? between(i, j) : here(i, j);
  }

  float* here(int i, int j) { return sums_ + (i * tiles_ + j) * kTileWords; }
  float* between(int i, int j) const { return work_.kept_sums(token_tile_ + i, tile_ + j); }

  const TileJob& job_;
  const Work& work_;
  const Span* span_ = nullptr;
  std::int64_t token_tile_ = 0, tile_ = 0;
  int tiles_ = 1;
  int held_ = 0;
  int left_ = 0;  ///< of the tiles of tokens, to be scaled
  float* to_[4]{};
  alignas(64) float totals_[4 * kTileWords];
  alignas(64) float sums_[4 * kTileWords];  ///< between the spans of a panel
};

/// Up to 2 tiles of tokens by up to 2 of the weight, of the whole panel. Products are a Product's,
/// of tokens in `parts`.
template <typename Product, int parts, int token_tiles, int tiles>
void multiply_tiles(const TileJob& job, const Work& work, Results<Product>& results,
                    std::int64_t token_tile, std::int64_t first_tile) {
  constexpr int kSums = token_tiles * tiles;
  for (int s = 0; s < work.count; ++s) {
    const Span& span = work.spans[s];
    const auto begin = [&](auto i) __attribute__((always_inline)) {
      results.template store<i>();
      if (i >= kSums) return;
      if (span.is_first) {
        zero_tile<i>();
      } else {
        load_tile<i>(work.kept_totals(token_tile + i / tiles, first_tile + i % tiles), kLineBytes);
      }
    };
    for_steps<4>([&](auto i) __attribute__((always_inline)) {
      if (i >= kSums || span.tiles == 0) begin(i);
    });
    const std::int32_t* x = job.x + job.x_tiles.at(token_tile * kTileTokens, span.block, span.tile);
    const std::byte* weight = work.panels + (first_tile * kPanelSteps + span.step) * kLineBytes;
    constexpr std::int64_t kStride = kPanelSteps * kLineBytes;
    if (span.tiles > 0) {
      add_products<Product, parts, token_tiles, tiles>(job, x, weight, kStride, begin);
    }
    for (std::int64_t k = 1; k < span.tiles; ++k) {
      results.scale_some();
      add_products<Product, parts, token_tiles, tiles>(job, x + k * kTileWords,
                                                       weight + k * kTileBytes, kStride);
    }
    results.scale_all();
    results.template begin<token_tiles, tiles>(s, token_tile, first_tile);
  }
}

/// Tiles of 16 tokens.
struct TokenRange {
  std::int64_t begin, end;
};

/// Some tiles of the weight by some tokens.
template <typename Product, int parts, typename Source>
class RowBlock {
 public:
  RowBlock(const TileJob& job, const Source& source, const TokenRange& tokens,
           std::int64_t most_tiles)
      : job_(job),
        source_(source),
        tokens_(tokens),
        panels_(most_tiles * kPanelWords),
        scales_(kMostSpans * kPanelTiles * static_cast<std::int64_t>(sizeof(TileScales)) / 4),
        totals_(is_one_panel() ? 0 : results()),
        sums_(is_one_panel() || job.blocks() == 1 ? 0 : results()) {}

  void multiply(std::int64_t first_tile, std::int64_t tiles) {
    tiles_ = tiles;
    const PackedLayout& layout = *job_.layout;
    for (std::int64_t i = 0; i < tiles; ++i) result_tiles_[i] = source_.tile(first_tile + i);
    filled_ = count_ = 0;
    for (std::int64_t g = 0; g < layout.groups(); ++g) {
      const std::int64_t lines = layout.group_lines(g);
      for (std::int64_t b = 0; b < job_.blocks_per_group; ++b) {
        const std::int64_t end = std::min(lines, (b + 1) * job_.block_lines);
        add_block(g, b, std::min(lines, b * job_.block_lines), end);
      }
    }
    multiply_panel();
  }

 private:
  static constexpr std::int64_t kSteps = Source::Line::kSteps;

  // Whether a panel has room for whole rows: nothing stays for the next one.
  bool is_one_panel() const {
    return job_.x_tiles.row_tiles * kTileSteps <= kPanelSteps && job_.blocks() <= kMostSpans;
  }
  std::int64_t results() const { return (tokens_.end - tokens_.begin) * kPanelTiles * kTileWords; }

  // Lines [begin, end) of a group, of every tile. An empty block still has its term.
  void add_block(std::int64_t group, std::int64_t block, std::int64_t begin, std::int64_t end) {
    const std::int64_t steps = (end - begin) * kSteps;
    if (filled_ + std::min(steps, kPanelSteps) > kPanelSteps) multiply_panel();
    std::int64_t i = begin;
    do {
      if (filled_ == kPanelSteps || count_ == kMostSpans) multiply_panel();
      const std::int64_t count = std::min(end - i, (kPanelSteps - filled_) / kSteps);
      const std::int64_t tiles = tiles_for(count * kSteps);
      for (std::int64_t t = 0; t < tiles_; ++t) decode_lines(t, group, i, count);
      add_span({.block = group * job_.blocks_per_group + block,
                .tile = (i - begin) * kSteps / kTileSteps,
                .step = filled_,
                .tiles = tiles,
                .is_first = i == begin,
                .is_last = i + count == end});
      i += count, filled_ += tiles * kTileSteps;
    } while (i < end);
  }

  void add_span(Span span) {
    if constexpr (kIsScaled<typename Source::Line>) {
      // Groups are parts of one block.
      span.is_first = span.is_first && span.block == 0;
      span.is_last = span.is_last && span.block + 1 == job_.layout->groups();
      span.tile += span.block * tiles_for(job_.layout->group_lines(0) * kSteps);
      span.block = 0;
      if (count_ > 0) {
        spans_[0].tiles += span.tiles, spans_[0].is_last = span.is_last;
        return;
      }
    }
    spans_[count_++] = span;
  }

  void decode_lines(std::int64_t index, std::int64_t group, std::int64_t first,
                    std::int64_t count) {
    const std::int64_t tile = result_tiles_[index];
    if constexpr (!kIsScaled<typename Source::Line>) {
      scales()[count_ * kPanelTiles + index] = source_.scales(tile, group);
    }
    decode(source_, tile, group, first, count,
           panels() + (index * kPanelSteps + filled_) * kLineBytes);
  }

  void multiply_panel() {
    const Work work{.first_token_tile = tokens_.begin,
                    .spans = spans_,
                    .count = count_,
                    .panels = panels(),
                    .scales = scales(),
                    .tiles = result_tiles_,
                    .totals = totals_.data(),
                    .sums = sums_.data()};
    Results<Product> results(job_, work);
    for (std::int64_t t = tokens_.begin; t < tokens_.end; t += 2) {
      const bool is_wide = tokens_.end - t > 1;
      for (std::int64_t i = 0; i < tiles_; i += 2) {
        const auto multiply = kMultiply[is_wide][tiles_ - i > 1];
        multiply(job_, work, results, t, i);
      }
    }
    results.finish();
    filled_ = count_ = 0;
  }

  static constexpr decltype(&multiply_tiles<Product, parts, 1, 1>) kMultiply[2][2] = {
      {multiply_tiles<Product, parts, 1, 1>, multiply_tiles<Product, parts, 1, 2>},
      {multiply_tiles<Product, parts, 2, 1>, multiply_tiles<Product, parts, 2, 2>}};

  std::byte* panels() const { return reinterpret_cast<std::byte*>(panels_.data()); }
  TileScales* scales() const { return reinterpret_cast<TileScales*>(scales_.data()); }

  const TileJob& job_;
  const Source& source_;
  TokenRange tokens_;
  Scratch panels_, scales_, totals_, sums_;
  Span spans_[kMostSpans];
  std::int64_t tiles_ = 0;
  std::int64_t result_tiles_[kPanelTiles]{};
  std::int64_t filled_ = 0;  ///< steps in the panel
  int count_ = 0;            ///< spans in the panel
};

/// Parts of the tokens that each have a thread of their own. Who prepares tokens has them in a near
/// cache; but every part decodes the weight anew.
inline std::int64_t token_parts(const TileJob& job) {
  const bool is_low = job.layout->spec().rows <= 4 * job.tokens;
  return job.tokens >= 256 && is_low ? 2 : 1;
}

template <typename Product, int parts, typename Source>
void many_tokens(const TileJob& job, const Source& source, const ParallelFor& parallel_for) {
  const std::int64_t tiles = job.layout->tiles(), token_tiles = job.x_tiles.count;
  const auto multiply = [&](const TokenRange& tokens, std::int64_t begin, std::int64_t end) {
    const std::int64_t most = panel_tiles(job.tokens, end - begin);
    RowBlock<Product, parts, Source> rows(job, source, tokens, most);
    for (std::int64_t i = begin; i < end; i += most) rows.multiply(i, std::min(most, end - i));
  };
  const std::int64_t count = token_parts(job);
  parallel_for(count * tiles, [&](std::int64_t begin, std::int64_t end) {
    const TileRegisters registers;
    if (end - begin == count * tiles) return multiply({0, token_tiles}, 0, tiles);
    for (std::int64_t p = begin / tiles; p * tiles < end; ++p) {
      multiply({token_tiles * p / count, token_tiles * (p + 1) / count},
               std::max<std::int64_t>(0, begin - p * tiles), std::min(tiles, end - p * tiles));
    }
  });
}

}  // namespace
}  // namespace quantal::kernels
