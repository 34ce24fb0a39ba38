#pragma once

// Included by this folder's files only, below their target pragma.
//
// The loops of every linear of this folder. A line of the packed weight is one row of a tile as it
// lies (bytes), or several once it is decoded (bf16 pairs, codes of fewer bits): 16 rows of the
// weight, 4 bytes of each. So a panel of decoded lines is read as tiles, 16 steps each, and so are
// 16 tokens by 64 bytes of their rows. 32 tokens by 32 rows of the result stay in four tiles.
//
// Some tiles of the weight by some columns are decoded into a panel that stays in the second-level
// cache, and every block of tokens is multiplied by all of it before the next one is made.

#include <algorithm>
#include <cstring>

#include "kernels/cpu/amx/tiles.h"
#include "kernels/cpu/avx512/output.h"
#include "kernels/cpu/avx512/rows.h"
#include "kernels/cpu/detect.h"
#include "kernels/scratch.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTileTokens = 16;
constexpr std::int64_t kTileSteps = 16;
constexpr std::int64_t kTileWords = kTileRows * kTileSteps;
constexpr std::int64_t kBlockTokens = 2 * kTileTokens;
constexpr std::int64_t kBlockTiles = 8;
constexpr std::int64_t kPanelSteps = 256;
constexpr std::int64_t kPanelWords = kPanelSteps * kTileRows;
constexpr std::int64_t kMostStripTokens = 1024;
constexpr int kMostSpans = 16;

/// With so few, kernels that read the weight from several places at once are as fast.
constexpr std::int64_t kFewTileTokens = 4;

/// Tokens for which there must be memory: whole tiles are read.
constexpr std::int64_t whole_tiles(std::int64_t tokens) {
  return (tokens + kTileTokens - 1) / kTileTokens * kTileTokens;
}

/// What is multiplied. Tokens lie one after the other, `x_stride` words of 4 bytes apart, and in
/// `parts` whose sum they are, `part_stride` words apart.
struct TileJob {
  const PackedLayout* layout;
  const std::byte* weight;
  std::int64_t tokens;
  const std::int32_t* x;
  std::int64_t x_stride, part_stride;
  std::int64_t group_words;  ///< of x, from one group to the next
  /// Σ x of each block of each group, [token][block], fp32 or int32 as the Product has it; null
  /// where the Product has no use for them.
  const std::int32_t* x_sums;
  std::int64_t blocks_per_group;
  std::int64_t block_lines;
  Output out;

  std::int64_t blocks() const { return layout->groups() * blocks_per_group; }
  const std::byte* tile(std::int64_t index) const { return weight + index * layout->tile_bytes(); }
};

/// A part of a block of a group that is in the panel.
struct Span {
  std::int64_t block;  ///< of a token's x_sums
  std::int64_t word;   ///< of a token, where it begins
  std::int64_t step;   ///< of the panel, too
  std::int64_t tiles;  ///< of kTileSteps; zeros fill the last one
  bool is_first;       ///< of its block
  bool is_last;
};

/// The panel and the results of a strip of tokens by its tiles, [token tile][tile][token][row].
struct Strip {
  const Span* spans;
  int count;
  const std::byte* panels;   ///< kPanelWords words a tile
  const TileScales* scales;  ///< [span][tile]
  float* totals;             ///< of a block that is longer than a panel
  float* sums;

  static std::int64_t at(std::int64_t token_tile, std::int64_t tile) {
    return (token_tile * kBlockTiles + tile) * kTileWords;
  }
};

// Tiles: 4 of sums, 2 of tokens, 2 of the weight.
constexpr int kXTile = 4, kWeightTile = 6;

/// Up to 2 tiles of tokens by up to 2 of the weight. Products are a Product's, of tokens in
/// `parts`.
template <typename Product, int parts, int token_tiles, int tiles>
void multiply_block(const TileJob& job, const Strip& strip, std::int64_t first_token,
                    std::int64_t token_tile, std::int64_t first_tile) {
  const std::int64_t x_bytes = job.x_stride * 4;
  alignas(64) float block_totals[token_tiles * tiles * kTileWords];
  const auto for_sums = [](const auto& body) __attribute__((always_inline)) {
    for_steps<token_tiles>([&](auto i) __attribute__((always_inline)) {
      for_steps<tiles>([&](auto j) __attribute__((always_inline)) { body(i, j); });
    });
  };
  for (int s = 0; s < strip.count; ++s) {
    const Span& span = strip.spans[s];
    const bool is_whole = span.is_first && span.is_last;
    const auto totals = [&](int i, int j) __attribute__((always_inline)) {
      return is_whole ? block_totals + (i * tiles + j) * kTileWords
                      : strip.totals + Strip::at(token_tile + i, first_tile + j);
    };
    for_sums([&](auto i, auto j) __attribute__((always_inline)) {
      if (span.is_first) {
        zero_tile<2 * i + j>();
      } else {
        load_tile<2 * i + j>(totals(i, j), kLineBytes);
      }
    });
    const std::int32_t* x = job.x + first_token * job.x_stride + span.word;
    const std::byte* weight = strip.panels + (first_tile * kPanelSteps + span.step) * kLineBytes;
    for (std::int64_t k = 0; k < span.tiles; ++k) {
      for_steps<tiles>([&](auto j) __attribute__((always_inline)) {
        load_tile<kWeightTile + j>(weight + j * kPanelSteps * kLineBytes, kLineBytes);
      });
      for_steps<parts>([&](auto part) __attribute__((always_inline)) {
        for_steps<token_tiles>([&](auto i) __attribute__((always_inline)) {
          load_tile<kXTile + i>(x + part * job.part_stride + i * kTileTokens * job.x_stride,
                                x_bytes);
        });
        for_sums([](auto i, auto j) __attribute__((always_inline)) {
          Product::template add<2 * i + j, kXTile + i, kWeightTile + j>();
        });
      });
      x += kTileSteps, weight += kTileSteps * kLineBytes;
    }
    for_sums([&](auto i, auto j) __attribute__((always_inline)) {
      store_tile<2 * i + j>(totals(i, j), kLineBytes);
    });
    if (!span.is_last) continue;
    for (int i = 0; i < token_tiles; ++i) {
      const std::int64_t token = first_token + i * kTileTokens;
      const std::int64_t count = std::min(kTileTokens, job.tokens - token);
      for (int j = 0; j < tiles; ++j) {
        const float* total = totals(i, j);
        float* sum = strip.sums + Strip::at(token_tile + i, first_tile + j);
        const TileScales& scales = strip.scales[s * kBlockTiles + first_tile + j];
        const std::int32_t* x_sums = job.x_sums + token * job.blocks() + span.block;
        for (std::int64_t t = 0; t < count; ++t) {
          const __m512 before = _mm512_loadu_ps(sum + t * kTileRows);
          const auto here = Product::load(total + t * kTileRows);
          _mm512_storeu_ps(sum + t * kTileRows,
                           Product::apply(before, here, scales, x_sums + t * job.blocks(), 0));
        }
      }
    }
  }
}

/// Takes `count` lines apart into steps of a panel, and fills the last tile with zeros.
template <typename Line>
void decode(const std::byte* lines, std::int64_t count, std::byte* panel) {
  const std::int64_t ahead = prefetch_bytes();
  for (std::int64_t i = 0; i < count; ++i) {
    Line line;
    _mm_prefetch(reinterpret_cast<const char*>(lines) + ahead, _MM_HINT_T0);
    line.load(lines);
    for_steps<Line::kSteps>([&](auto step) __attribute__((always_inline)) {
      _mm512_storeu_si512(panel + step * kLineBytes, line.template get<step>());
    });
    lines += kLineBytes, panel += Line::kSteps * kLineBytes;
  }
  for (std::int64_t step = count * Line::kSteps; step % kTileSteps != 0; ++step) {
    _mm512_storeu_si512(panel, _mm512_setzero_si512());
    panel += kLineBytes;
  }
}

/// Some tiles of the weight by a strip of tokens.
template <typename Line, typename Product, int parts>
class RowBlock {
 public:
  RowBlock(const TileJob& job, std::int64_t strip_tokens)
      : job_(job),
        panels_(kBlockTiles * kPanelWords),
        scales_(kMostSpans * kBlockTiles * static_cast<std::int64_t>(sizeof(TileScales)) / 4),
        totals_(whole_tiles(strip_tokens) * kBlockTiles * kTileRows),
        sums_(whole_tiles(strip_tokens) * kBlockTiles * kTileRows) {}

  void multiply(std::int64_t first_tile, std::int64_t tiles, std::int64_t first_token,
                std::int64_t tokens) {
    tile_ = first_tile, tiles_ = tiles, token_ = first_token, tokens_ = tokens;
    const PackedLayout& layout = *job_.layout;
    std::memset(sums_.data(), 0,
                whole_tiles(tokens) * kBlockTiles * kTileRows * static_cast<int>(sizeof(float)));
    filled_ = count_ = 0;
    for (std::int64_t g = 0; g < layout.groups(); ++g) {
      const std::int64_t lines = layout.group_lines(g);
      for (std::int64_t b = 0; b < job_.blocks_per_group; ++b) {
        const std::int64_t end = std::min(lines, (b + 1) * job_.block_lines);
        add_block(g, b, std::min(lines, b * job_.block_lines), end);
      }
    }
    multiply_panel();
    store();
  }

 private:
  // Lines [begin, end) of a group, of every tile. An empty block still has its term.
  void add_block(std::int64_t group, std::int64_t block, std::int64_t begin, std::int64_t end) {
    const std::int64_t steps = (end - begin) * Line::kSteps;
    if (filled_ + std::min(steps, kPanelSteps) > kPanelSteps) multiply_panel();
    std::int64_t i = begin;
    do {
      const std::int64_t count = std::min(end - i, (kPanelSteps - filled_) / Line::kSteps);
      const std::int64_t tiles = (count * Line::kSteps + kTileSteps - 1) / kTileSteps;
      spans_[count_] = {.block = group * job_.blocks_per_group + block,
                        .word = group * job_.group_words + i * Line::kSteps,
                        .step = filled_,
                        .tiles = tiles,
                        .is_first = i == begin,
                        .is_last = i + count == end};
      for (std::int64_t t = 0; t < tiles_; ++t) decode_lines(t, group, i, count);
      i += count, filled_ += tiles * kTileSteps, ++count_;
      if (filled_ == kPanelSteps || count_ == kMostSpans) multiply_panel();
    } while (i < end);
  }

  void decode_lines(std::int64_t index, std::int64_t group, std::int64_t first,
                    std::int64_t count) {
    const std::byte* tile = job_.tile(tile_ + index);
    scales()[count_ * kBlockTiles + index] = TileScales(*job_.layout, tile, group);
    decode<Line>(tile + job_.layout->group_offset(group) + first * kLineBytes, count,
                 panels() + (index * kPanelSteps + filled_) * kLineBytes);
  }

  // By all tokens of the strip.
  void multiply_panel() {
    const Strip strip{.spans = spans_,
                      .count = count_,
                      .panels = panels(),
                      .scales = scales(),
                      .totals = totals_.data(),
                      .sums = sums_.data()};
    for (std::int64_t t = 0; t < tokens_; t += kBlockTokens) {
      const bool is_wide = tokens_ - t > kTileTokens;
      for (std::int64_t i = 0; i < tiles_; i += 2) {
        const auto multiply = kMultiply[is_wide][tiles_ - i > 1];
        multiply(job_, strip, token_ + t, t / kTileTokens, i);
      }
    }
    filled_ = count_ = 0;
  }

  void store() const {
    for (std::int64_t t = 0; t < tokens_; ++t) {
      const float* sums =
          sums_.data() + Strip::at(t / kTileTokens, 0) + t % kTileTokens * kTileRows;
      for (std::int64_t i = 0; i < tiles_; ++i) {
        store_rows(job_.out, tile_ + i, token_ + t, _mm512_loadu_ps(sums + i * kTileWords));
      }
    }
  }

  static constexpr decltype(&multiply_block<Product, parts, 1, 1>) kMultiply[2][2] = {
      {multiply_block<Product, parts, 1, 1>, multiply_block<Product, parts, 1, 2>},
      {multiply_block<Product, parts, 2, 1>, multiply_block<Product, parts, 2, 2>}};

  std::byte* panels() const { return reinterpret_cast<std::byte*>(panels_.data()); }
  TileScales* scales() const { return reinterpret_cast<TileScales*>(scales_.data()); }

  const TileJob& job_;
  Scratch panels_, scales_, totals_, sums_;
  Span spans_[kMostSpans];
  std::int64_t tile_ = 0, tiles_ = 0, token_ = 0, tokens_ = 0;
  std::int64_t filled_ = 0;  ///< steps in the panel
  int count_ = 0;            ///< spans in the panel
};

template <typename Line, typename Product, int parts>
void multiply(const TileJob& job, const ParallelFor& parallel_for) {
  const std::int64_t strips = (job.tokens + kMostStripTokens - 1) / kMostStripTokens;
  const std::int64_t blocks = (job.tokens + strips * kBlockTokens - 1) / (strips * kBlockTokens);
  const std::int64_t strip = std::min(job.tokens, blocks * kBlockTokens);
  parallel_for(job.layout->tiles(), [&](std::int64_t begin, std::int64_t end) {
    const TileRegisters registers;
    RowBlock<Line, Product, parts> rows(job, strip);
    for (std::int64_t t = 0; t < job.tokens; t += strip) {
      for (std::int64_t i = begin; i < end; i += kBlockTiles) {
        rows.multiply(i, std::min(kBlockTiles, end - i), t, std::min(strip, job.tokens - t));
      }
    }
  });
}

}  // namespace
}  // namespace quantal::kernels
